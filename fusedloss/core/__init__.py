"""What every other layer builds on: the row's loss, checks, reductions."""

"""Benchmarks: ``python -m bench softmax_ce class_stats``, or ``pytest bench --benchmark-only``."""

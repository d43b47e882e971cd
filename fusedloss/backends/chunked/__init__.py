"""Linear heads over any softmax backend: chunks of logits between PyTorch's matrix products."""

"""CUDA C++ kernels for what Triton cannot express: off unless asked for, and never the only way to a result."""

"""What makes PyTorch's ``meta`` device allocate as a CUDA device does."""

"""What a kernel takes within one operation, and gives back before the next."""

import torch
from torch import Tensor


def borrow(like: Tensor, nbytes: int) -> None:
    """Take so many bytes on a tensor's device, and give them back."""
    like.new_empty(nbytes, dtype=torch.uint8)

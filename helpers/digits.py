"""A small network that reads MNIST's digits, the same on every machine to FP32's last bit.

It is trained in FP64 and rounded to FP32. Machines differ in the last digits of FP64, and the
29 bits of mantissa that FP32 drops swallow that.
"""

import torch
from torch import Tensor, nn

from helpers.mnist import mnist


def digits(train: bool, count: int = 2000) -> tuple[Tensor, Tensor]:
    """Images in FP64 without their empty border, 576 pixels each, and their labels."""
    data = mnist(train=train)
    pixels = data.data[:count, 2:-2, 2:-2].flatten(1).double() / 255
    return (pixels - 0.1307) / 0.3081, data.targets[:count]


def trained_network() -> nn.Sequential:
    """576 -> 64 -> 10 units in FP64, after 60 steps of SGD with momentum."""
    torch.manual_seed(0)
    first, last = (nn.Linear(m, n, dtype=torch.float64) for m, n in ((576, 64), (64, 10)))
    network = nn.Sequential(first, nn.Tanh(), last)
    inputs, labels = digits(train=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(network(inputs), labels).backward()
        optimizer.step()
    return network


@torch.no_grad()
def right(network: nn.Sequential, state: dict[str, Tensor]) -> int:
    """How many of 2,000 test digits the network reads with these weights, in FP64."""
    inputs, labels = digits(train=False)
    network.load_state_dict(state)
    return int((network(inputs).argmax(1) == labels).sum())

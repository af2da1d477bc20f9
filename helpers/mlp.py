"""The model of the source article's experiment."""

import torch
from torch import nn


class SimpleMLP(nn.Module):
    """Six linear layers with ReLU between them, 784 inputs, 10 classes: 51,008,010 parameters."""

    widths = (28 * 28, 8192, 4096, 2048, 1024, 512, 10)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU after the last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (batch, 1, 28, 28) to logits (batch, 10)."""
        return self.layers(images.view(images.size(0), -1))

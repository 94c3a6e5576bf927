"""The critic's head: a hidden state goes in, the expected return from there comes out."""

from __future__ import annotations

import torch
from torch import nn


class ValueHead(nn.Module):
    """Linear [N, H] -> [N], float32. Starts at zero, so that the first advantages are the returns themselves."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Values of the states."""
        return self.linear(hidden_NH.float()).squeeze(-1)

"""Muon: momentum whose update is orthogonalised, for hidden weight matrices.

After Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def orthogonalise(grads: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices of `grads: (N, rows, columns)`.

    A quintic Newton-Schulz iteration brings all singular values near one. Its
    coefficients trade exactness for slope at zero.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = grads.shape[1] > grads.shape[2]
    x = (grads.mT if tall else grads).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """For 2-D weights only. AdamW takes all other parameters."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(params), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            # Matrices of one shape are orthogonalised together, in one batched matmul.
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                updates = []
                for weight in weights:
                    assert weight.grad is not None, "every Muon weight needs a gradient"
                    state = self.state[weight]
                    if not state:
                        state["momentum"] = torch.zeros_like(weight)
                    state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                    updates.append(
                        weight.grad.lerp(state["momentum"], group["momentum"])
                    )
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for weight, update in zip(
                    weights, orthogonalise(torch.stack(updates)), strict=True
                ):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"] * scale)

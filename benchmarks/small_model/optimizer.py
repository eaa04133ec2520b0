"""The optimizers: AdamW for all weights, or Muon for matrices within layers and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.98)
MUON_RATE = 10.0
"""How many times AdamW's learning rate Muon's is: its updates have spectral norm 1, not entries of about 1."""


def adamw(modules: list[nn.Module]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, fused=True)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The matrix with its singular values moved to about 1, by Newton and Schulz's iteration.

    Example:
        >>> values = torch.linalg.svdvals(orthogonal(torch.randn(8, 24, generator=torch.Generator().manual_seed(0))))
        >>> bool((values > 0.6).all() and (values < 1.3).all())
        True
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):  # the coefficients are Jordan's (https://kellerjordan.github.io/posts/muon/)
        gram = wide @ wide.T
        wide = torch.addmm(3.4445 * wide, torch.addmm(-4.7750 * gram, gram, gram, alpha=2.0315), wide)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for some parameters and AdamW for the others, as one optimizer.

    Groups with ``muon=True`` hold matrices. Their update is the orthogonalised momentum, so that all directions of a matrix learn
    at one speed: of use where a run can afford few steps.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """``groups`` hold ``params``, ``weight_decay`` and ``muon``."""
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adamw)(group, parameters)

    def _moments(self, parameters: list[nn.Parameter], name: str) -> list[torch.Tensor]:
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

    def _muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        moments = self._moments(parameters, "momentum")
        torch._foreach_lerp_(moments, gradients, 0.05)
        rate = group["lr"] * MUON_RATE
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for parameter, gradient, moment in zip(parameters, gradients, moments, strict=True):
            update = orthogonal(gradient.lerp(moment, 0.95))
            parameter.add_(update, alpha=-rate * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5)

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        first, second = self._moments(parameters, "exp_avg"), self._moments(parameters, "exp_avg_sq")
        for parameter in parameters:
            self.state[parameter].setdefault("step", torch.zeros(()))
            self.state[parameter]["step"] += 1
        steps = [self.state[parameter]["step"].item() for parameter in parameters]
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, [(1 - BETAS[1] ** step) ** 0.5 for step in steps])
        torch._foreach_add_(root, 1e-8)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, first, root, [-group["lr"] / (1 - BETAS[0] ** step) for step in steps])


def muon(modules: list[nn.Module]) -> Muon:
    """Muon for the linear layers within the encoders and decoders of these modules, AdamW for all else."""
    inner = {
        id(layer.weight)
        for module in modules
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "layers." in name
    }
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if id(p) in inner], "weight_decay": 0.05, "muon": True},
        {"params": [p for p in parameters if p.ndim > 1 and id(p) not in inner], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return Muon([group for group in groups if group["params"]])


OPTIMIZERS = {"adamw": adamw, "muon": muon}

__all__ = ["OPTIMIZERS", "Muon", "adamw", "muon", "orthogonal"]

"""Muon for the stacked matrices, Adam for embeddings and norms, plain functions over tensors.

The state is a dict of tensors named after the weights, so a checkpoint is one `torch.save`.
"""

import torch
from torch import Tensor

from bench.train_builtin.model import MATRICES, Weights

State = dict[str, Tensor]
_MOMENTUM = 0.95
_BETAS = (0.9, 0.98)


def init_state(weights: Weights) -> State:
    """Zero moments for every weight."""
    state: State = {}
    for name, w in weights.items():
        state[f"{name}.first"] = torch.zeros_like(w)
        if name not in MATRICES:
            state[f"{name}.second"] = torch.zeros_like(w)
    return state


def orthogonalize(update: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack [L, out, in], by five Newton-Schulz steps."""
    x: Tensor = update.bfloat16()
    transposed = x.size(-2) > x.size(-1)
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if transposed else x).float()


@torch.no_grad()
def apply(weights: Weights, state: State, step: int, lr_muon: float, lr_adam: float) -> None:
    """One update from the gradients in `weights`, which are then cleared; `step` counts from 1."""
    for name, w in weights.items():
        grad = w.grad
        assert grad is not None, name
        first = state[f"{name}.first"]
        if name in MATRICES:
            first.lerp_(grad, 1 - _MOMENTUM)
            update = orthogonalize(grad.lerp(first, _MOMENTUM))
            scale = max(1.0, w.size(-2) / w.size(-1)) ** 0.5
            w.mul_(1 - lr_muon * 0.05).sub_(update, alpha=lr_muon * scale)
        else:
            second = state[f"{name}.second"]
            first.lerp_(grad, 1 - _BETAS[0])
            second.lerp_(grad.square(), 1 - _BETAS[1])
            unbiased = (second / (1 - _BETAS[1] ** step)).sqrt() + 1e-8
            w.sub_(first / (1 - _BETAS[0] ** step) / unbiased, alpha=lr_adam)
        w.grad = None

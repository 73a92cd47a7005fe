"""The MLPs of the architectures: gated, plain, and a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from stallfree.model.linear import Linear

# (T, hidden) -> (T, hidden)
Mlp = Callable[[torch.Tensor], torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: Mapping[str, Activation] = {  # by their names in Hugging Face configurations
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def gated_mlp(gate_up: Linear, down: Linear, activation: Activation) -> Mlp:
    """`down(activation(gate(x)) * up(x))`, with gate and up as one layer, gate first."""

    def run(x: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(activation(gate) * up)

    return run


def plain_mlp(up: Linear, down: Linear, activation: Activation) -> Mlp:
    """`down(activation(up(x)))`."""
    return lambda x: down(activation(up(x)))


def mixture(router: Linear, experts: Mapping[int, Mlp], per_token: int) -> Mlp:
    """A sparse mixture of experts (Mixtral, arXiv 2401.04088).

    Each token goes through the `per_token` experts that the router finds likeliest; what they
    give is added in proportion to their probabilities.

    Args:
        router: (T, hidden) -> (T, E), E experts in all.
        experts: by number; what those that are not here would add is left out.
        per_token: experts of each token.
    """

    def run(x: torch.Tensor) -> torch.Tensor:
        weights, chosen = router(x).float().softmax(dim=-1).topk(per_token, dim=-1)  # (T, k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in experts.items():
            rows, ranks = torch.where(chosen == number)
            if len(rows):
                share = weights[rows, ranks, None]
                out.index_add_(0, rows, (expert(x[rows]) * share).to(x.dtype))
        return out

    return run

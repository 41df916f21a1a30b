"""Sparse upcycling: the weights of a mixture of experts, made from the weights of a dense model.

The method is that of arXiv 2212.05055, and of the script behind OLMoE's own upcycling experiment (arXiv
2409.02060, section 4.1.5; scripts/sparsify_ckpt_unsharded.py in its repository). Every expert is a copy of
the dense MLP, in which a fraction of the weights may be reinitialized. The router is initialized like that of
a new model. All other weights are kept. An expert may also be a slice of a copy (arXiv 2410.07524, "virtual
groups").

Shapes: D hidden size, F expert width, G slices per copy of the MLP. The dense MLP is G F wide.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoe_train.model import OlmoeConfig
from olmoe_train.model.initialization import generator_of, initial_value, truncated_normal


@dataclass(frozen=True)
class Reinitialization:
    """How much of each copy of the MLP is drawn at random instead of copied."""

    fraction: float = 0.0
    """Fraction of each copy's weights that are reinitialized, from 0 to 1."""
    std: float = 0.02
    """Standard deviation of the new values, a truncated normal."""


def upcycled_reader(
    dense: Callable[[str], Tensor],
    dense_width: int,
    config: OlmoeConfig,
    seed: int,
    reinitialization: Reinitialization,
) -> Callable[[str], Tensor]:
    """Make the parameters of an upcycled model, each when it is read.

    Expert e is slice e % G of copy e // G. The slices of one copy have the same router row, so a token is
    sent to all of them or to none, with equal weights. Each slice then has 1/G of the weight of the copy,
    which multiplying down_proj by G makes up for.

    Args:
        dense: Returns one whole parameter of the dense model, which has the same architecture as `config`
            except for its one expert, by in-memory name.
        dense_width: MLP width of the dense model, a multiple of `config.intermediate_size`.
        config: Architecture of the upcycled model.
        seed: Seed of all random values. A value depends only on the seed, the parameter's name and the copy.
        reinitialization: What fraction of each copy is drawn at random.

    Returns:
        A function that returns one whole parameter of the upcycled model by in-memory name.
    """
    slices = dense_width // config.intermediate_size
    copies = config.num_experts // slices

    def read(name: str) -> Tensor:
        if name.endswith("mlp.gate.weight"):
            rows = initial_value(name, (copies, config.hidden_size), seed, config.initializer_range)
            return rows.repeat_interleave(slices, 0)
        if ".mlp.experts." not in name:
            return dense(name)
        weight = dense(name)[0]
        if reinitialization.fraction == 0:
            return _cut(name, weight, slices).repeat(copies, 1, 1)
        keys = [f"{seed}/{name}/noise/{copy}" for copy in range(copies)]
        return torch.cat(
            [_cut(name, _reinitialize_fraction(weight, key, reinitialization), slices) for key in keys]
        )

    return read


def _cut(name: str, weight: Tensor, slices: int) -> Tensor:
    """Cut a dense projection into `slices` experts: [2 G F, D] -> [G, 2 F, D], or [D, G F] -> [G, D, F]."""
    if slices == 1:
        return weight[None]
    if name.endswith("down_proj"):
        return slices * weight.float().unflatten(1, (slices, -1)).transpose(0, 1)
    return weight.unflatten(0, (2, slices, -1)).transpose(0, 1).flatten(1, 2)


def _reinitialize_fraction(weight: Tensor, key: str, reinitialization: Reinitialization) -> Tensor:
    """Replace a random fraction of the weights by values from a truncated normal; `key` seeds both draws."""
    fresh = truncated_normal(key, weight.shape, reinitialization.std).to(weight.dtype)
    chosen = torch.rand(weight.shape, generator=generator_of(f"{key}/chosen")) < reinitialization.fraction
    return torch.where(chosen, fresh, weight)

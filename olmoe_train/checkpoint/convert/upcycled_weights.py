"""The weights of a mixture of experts out of a dense model's (sparse upcycling).

As in arXiv 2212.05055, and in the script that OLMoE's own experiment ran (arXiv 2409.02060, section 4.1.5;
scripts/sparsify_ckpt_unsharded.py in its repository): every expert is a copy of the MLP, with or without a
share of its weights drawn anew, the router is drawn as a new model's, all else is kept. Experts that are
slices of the copies: arXiv 2410.07524, "virtual groups".

Shapes: D hidden, F expert width, G slices that a copy of the MLP is cut into, so the dense one is G F wide.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoe_train.model import OlmoeConfig
from olmoe_train.model.initialization import generator_of, initial_value, truncated_normal


@dataclass(frozen=True)
class Noise:
    fraction: float = 0.0
    """Share of each copy's weights that are drawn anew."""
    std: float = 0.02
    """Standard deviation of these."""


def upcycled(
    dense: Callable[[str], Tensor], dense_width: int, config: OlmoeConfig, seed: int, noise: Noise
) -> Callable[[str], Tensor]:
    """The parameters of the model that `config` describes by name, each made when it is asked for.

    dense: the parameters of the same model with one expert, which is dense_width wide. Random values depend
    on (seed, name, copy) alone.

    Expert e is slice e % G of copy e // G. The slices of a copy have the same router row, so a token that
    chooses one chooses them all, in equal parts: each has 1/G of the copy's weight, and down_proj is
    multiplied by G.
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
        if noise.fraction == 0:
            return _cut(name, weight, slices).repeat(copies, 1, 1)
        keys = [f"{seed}/{name}/noise/{copy}" for copy in range(copies)]
        return torch.cat([_cut(name, _partly_anew(weight, key, noise), slices) for key in keys])

    return read


def _cut(name: str, weight: Tensor, slices: int) -> Tensor:
    """A dense projection as that of `slices` experts: [2 G F, D] -> [G, 2 F, D], or [D, G F] -> [G, D, F]."""
    if slices == 1:
        return weight[None]
    if name.endswith("down_proj"):
        return slices * weight.float().unflatten(1, (slices, -1)).transpose(0, 1)
    return weight.unflatten(0, (2, slices, -1)).transpose(0, 1).flatten(1, 2)


def _partly_anew(weight: Tensor, key: str, noise: Noise) -> Tensor:
    fresh = truncated_normal(key, weight.shape, noise.std).to(weight.dtype)
    chosen = torch.rand(weight.shape, generator=generator_of(f"{key}/chosen")) < noise.fraction
    return torch.where(chosen, fresh, weight)

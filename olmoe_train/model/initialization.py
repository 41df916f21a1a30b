"""Initial weights: a truncated normal that depends on (seed, parameter name, expert) alone.

Every value is drawn on the CPU from a generator of its own parameter (of its own expert, for the stacked
expert weights), so each layout of ranks, and each device, starts from the same weights bit for bit. Source:
arXiv 2409.02060, appendix B: normal, standard deviation 0.02, cut at 3 standard deviations, for all matrices.

Shapes: E experts; other dimensions as the parameter's.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CUT_AT_STANDARD_DEVIATIONS = 3.0


def init_weights(model: nn.Module, seed: int, std: float) -> None:
    """Fill every parameter of a model that is whole on this rank. std: OlmoeConfig.initializer_range."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed, std))


def initial_value(
    name: str, shape: Sequence[int], seed: int, std: float, experts: Sequence[int] | None = None
) -> Tensor:
    """A parameter's initial value, fp32 on the CPU: 1 for norm weights, 0 for biases, else truncated normal.

    shape: the whole parameter's. experts: for stacked expert weights [E, ...], which experts to make (default
    all); the result's first dimension follows it.
    """
    if name.endswith("bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.ones(*shape)
    if len(shape) == 2:
        return truncated_normal(f"{seed}/{name}", shape, std)
    indices = range(shape[0]) if experts is None else experts
    values = [truncated_normal(f"{seed}/{name}/{expert}", shape[1:], std) for expert in indices]
    return torch.stack(values) if values else torch.empty(0, *shape[1:])


def truncated_normal(key: str, shape: Sequence[int], std: float) -> Tensor:
    """fp32 on the CPU, a function of the key alone."""
    cut = CUT_AT_STANDARD_DEVIATIONS * std
    return nn.init.trunc_normal_(torch.empty(*shape), 0.0, std, -cut, cut, generator=generator_of(key))


def generator_of(key: str) -> torch.Generator:
    """A generator on the CPU whose seed is a hash of the key."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

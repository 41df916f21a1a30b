"""Initial weights: a truncated normal that depends only on (seed, parameter name, expert), or a normal.

Each parameter has its own CPU generator. Stacked expert weights have one generator per expert. Every layout
of ranks and every device therefore starts from the same weights, bit for bit. Source: arXiv 2409.02060,
appendix B: for all matrices a normal distribution with standard deviation 0.02, cut at 3 standard deviations.

Shapes: E experts; the other dimensions are those of the parameter.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

CUT_AT_STANDARD_DEVIATIONS = 3.0


def init_weights(model: nn.Module, seed: int, std: float, distribution: str = "truncated_normal") -> None:
    """Fill every parameter of an unsharded model in place.

    Args:
        model: A model whose parameters are complete on this rank, on any device but meta.
        seed: Seed of the run.
        std: Standard deviation of the matrices (OlmoeConfig.initializer_range).
        distribution: OlmoeConfig.initialization.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed, std, distribution=distribution))


def initial_value(
    name: str,
    shape: Sequence[int],
    seed: int,
    std: float,
    experts: Sequence[int] | None = None,
    distribution: str = "truncated_normal",
) -> Tensor:
    """Initial value of one parameter: 1 for norm weights, 0 for biases, else drawn from a distribution.

    Args:
        name: Name of the parameter in the model; part of the generator's seed.
        shape: Shape of the unsharded parameter.
        seed: Seed of the run.
        std: Standard deviation before the cut.
        experts: For stacked expert weights [E, ...], the experts to generate (default: all).
        distribution: OlmoeConfig.initialization: truncated_normal or normal.

    Returns:
        fp32 on the CPU. The shape is `shape`; if `experts` is given, the first dimension has one entry per
        listed expert, in the order of the list.
    """
    if name.endswith("bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.ones(*shape)
    draw = DISTRIBUTIONS[distribution]
    if len(shape) == 2:
        return draw(f"{seed}/{name}", shape, std)
    indices = range(shape[0]) if experts is None else experts
    values = [draw(f"{seed}/{name}/{expert}", shape[1:], std) for expert in indices]
    return torch.stack(values) if values else torch.empty(0, *shape[1:])


def truncated_normal(key: str, shape: Sequence[int], std: float) -> Tensor:
    """Values of a truncated normal that depend only on the arguments.

    Args:
        key: Text from which the generator's seed is derived.
        shape: Shape of the result.
        std: Standard deviation before the cut at CUT_AT_STANDARD_DEVIATIONS.

    Returns:
        fp32 tensor on the CPU.
    """
    cut = CUT_AT_STANDARD_DEVIATIONS * std
    return nn.init.trunc_normal_(torch.empty(*shape), 0.0, std, -cut, cut, generator=generator_of(key))


def normal(key: str, shape: Sequence[int], std: float) -> Tensor:
    """Values of a normal distribution, not cut, that depend only on the arguments; as truncated_normal."""
    return torch.empty(*shape).normal_(0.0, std, generator=generator_of(key))


DISTRIBUTIONS: dict[str, Callable[[str, Sequence[int], float], Tensor]] = {
    "truncated_normal": truncated_normal,
    "normal": normal,
}
"""OlmoeConfig.initialization -> (key, shape, standard deviation) -> values."""


def generator_of(key: str) -> torch.Generator:
    """Return a CPU generator whose seed is a 64-bit hash of `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def init_unless_meta(module: nn.Module, std: float, distribution: str) -> None:
    """Fill the parameters with random weights, with a seed drawn from torch's global generator.

    A meta model stays empty: distributed/materialize.py initializes it.
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        init_weights(module, int(torch.randint(2**62, ())), std, distribution)

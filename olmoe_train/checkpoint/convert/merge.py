"""The weighted mean of models that have one architecture, such as the checkpoints of a run.

Sums are in fp64 and are rounded once, to the data type that is written. Weights are read one parameter at a
time.

Merging instead of a decay (WSM, arXiv 2507.17634): the mean of checkpoints that a constant learning rate made
takes the place of a run whose learning rate decays. docs/guides/merge.md derives the weights.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import StoredModel, bias_error
from olmoe_train.checkpoint.directory import step_of
from olmoe_train.config.choices import MergeDecay
from olmoe_train.model.hf.directory import check_same_architecture
from olmoe_train.run.loggers import read_records
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import read_json_object
from olmoe_train.utils.finite import first_not_finite

Read = Callable[[str], Tensor]

UNIFORM = "uniform"
CHUNK = 2**17  # elements at a time: 1 MiB in fp64, which stays in the cache of a core
CONSTANT = 1.01  # a learning rate whose extremes have at most this ratio counts as constant

# Integrals from 0 to p of the shapes of a decay, which fall from 1 at p = 0 to 0 at p = 1.
_INTEGRALS: dict[MergeDecay, Callable[[float], float]] = {
    MergeDecay.linear: lambda p: p - p * p / 2,
    MergeDecay.cosine: lambda p: p / 2 + math.sin(math.pi * p) / (2 * math.pi),
    MergeDecay.sqrt: lambda p: p - 2 / 3 * p**1.5,
}


# --- weights ----------------------------------------------------------------------------------------------


def given_weights(weights: Any, number: int) -> list[float]:
    """The weights that the key `weights` gives, normalized to sum to 1.

    Args:
        weights: "uniform", or a list of numbers.
        number: Number of sources.

    Raises:
        UserError: It is neither, has another length, or has a number that is not finite or a sum of 0.
    """
    if weights == UNIFORM:
        return [1 / number] * number
    if not isinstance(weights, list) or not all(type(one) in (int, float) for one in weights):
        raise UserError(f"weights={weights}: give uniform, or a list of numbers such as [1,2,1]")
    if len(weights) != number:
        raise UserError(
            f"weights={weights} has {len(weights)} numbers for {number} sources: give one for each"
        )
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights={weights}: all numbers must be finite")
    total = math.fsum(weights)
    if abs(total) <= 1e-9 * math.fsum(map(abs, weights)):
        raise UserError(
            f"weights={weights} sum to {total:.3g}, and a mean divides by the sum: it must not be 0"
        )
    return [one / total for one in weights]


def decay_weights(decay: MergeDecay, steps: Sequence[int]) -> list[float]:
    """The weights with which checkpoints of a constant learning rate make up for a decay.

    Between two checkpoints the learning rate is taken to have the mean of the decay over these steps.

    Args:
        decay: How the learning rate would fall, from its whole value at the first step to 0 at the last.
        steps: Steps of the checkpoints, at least two, increasing.

    Returns:
        One weight per checkpoint, none of them negative; they sum to 1.
    """
    integral = _INTEGRALS[decay]
    positions = [(step - steps[0]) / (steps[-1] - steps[0]) for step in steps]
    means = [(integral(end) - integral(start)) / (end - start) for start, end in pairwise(positions)]
    return [before - after for before, after in pairwise([1.0, *means, 0.0])]


# --- sources ----------------------------------------------------------------------------------------------


def check_sources(models: list[StoredModel]) -> None:
    """Check that a mean of these models makes sense.

    Raises:
        UserError: There are fewer than two, one is there twice or has a bias in the choice of experts, or
            they differ in the architecture or in the tokenizer; the message names the field.
    """
    if len(models) < 2:
        raise UserError(f"sources names one model, {models[0].name}: a mean needs at least two")
    first, seen = models[0], set()
    tokenizer = _tokenizer(first)
    for model in models:
        if model.bias_LE is not None:
            raise UserError(bias_error(model, "a mean of models has no place for it: leave the model out"))
        place = (model.checkpoint or model.tokenizer).resolve()
        if place in seen:
            raise UserError(f"sources has {model.name} twice: give it once, with a greater weight")
        seen.add(place)
        check_same_architecture(first.config, model.config, model.name, first.name)
        theirs = _tokenizer(model)
        if tokenizer is not None and theirs is not None and tokenizer != theirs:
            raise UserError(
                f"{model.name} has another tokenizer than {first.name}, so their token ids do not mean the "
                f"same: {model.tokenizer / 'tokenizer.json'} and {first.tokenizer / 'tokenizer.json'} differ"
            )


def _tokenizer(model: StoredModel) -> dict[str, Any] | None:
    """What decides about the token ids of a text. None: the model has no tokenizer.json."""
    path = model.tokenizer / "tokenizer.json"
    if not path.is_file():
        return None
    # Transformers writes into the file how it was last called.
    return {
        key: value for key, value in read_json_object(path).items() if key not in ("truncation", "padding")
    }


def common_run(models: list[StoredModel]) -> Path | None:
    """The run directory that all models are checkpoints of. None: there is no such run."""
    runs = {model.checkpoint and model.checkpoint.resolve().parent.parent for model in models}
    return runs.pop() if len(runs) == 1 else None


def steps_of(models: list[StoredModel]) -> list[int]:
    """The steps of the checkpoints of one run; of other models their numbers, as if equally many steps lay
    between them.

    Raises:
        UserError: The steps of a run do not increase.
    """
    if common_run(models) is None:
        return list(range(len(models)))
    steps = [step_of(model.checkpoint) for model in models if model.checkpoint is not None]
    if any(after <= before for before, after in pairwise(steps)):
        raise UserError(
            f"sources has the steps {', '.join(map(str, steps))}, and a decay goes forward in time: sort them"
        )
    return steps


def merge_warnings(models: list[StoredModel], weights: list[float], decay: MergeDecay | None) -> list[str]:
    """What the user should know about a merge that is possible."""
    warnings = []
    run = common_run(models)
    if run is None and models[0].config.num_experts > 1:
        warnings.append(
            "the sources are not checkpoints of one run. Experts are averaged by their index, and averaging "
            "experts of different runs is only sensible if they share their initial weights"
        )
    if min(weights) < 0:
        warnings.append("a weight is negative: the result is not between the sources")
    if decay is not None and run is None:
        warnings.append(
            f"decay={decay.value} takes the sources as equally spaced in one training, the oldest first: "
            "their steps are not known"
        )
    if decay is not None and run is not None:
        first, *_, last = steps_of(models)
        records = read_records(run / "metrics.jsonl")
        rates = [one["train/lr"] for one in records if first <= one["step"] <= last and "train/lr" in one]
        if rates and max(rates) > CONSTANT * min(rates):
            warnings.append(
                f"decay={decay.value} makes up for a decay that the run did not have, but its learning rate "
                f"went from {rates[0]:.3g} to {rates[-1]:.3g} from step {first} to {last} (metrics.jsonl)"
            )
    return warnings


# --- the mean ---------------------------------------------------------------------------------------------


def merged_reader(reads: list[Read], weights: list[float], dtype: torch.dtype) -> Read:
    """Make the weighted mean of models, each parameter when it is read.

    It is first + sum of weight * (other - first), in fp64. So what is equal in all models comes out bit for
    bit, whatever the weights are. At most three of the parameters are in memory at a time, one of them in
    fp64, and not those of all models.

    Args:
        reads: For each model, a function that returns one whole parameter by its in-memory name.
        weights: One weight per model. They sum to 1.
        dtype: Data type of the mean.

    Returns:
        A function that returns the mean of one whole parameter by its in-memory name. It raises a UserError
        if a value of it is not finite.
    """

    def read(name: str) -> Tensor:
        first = reads[0](name)
        change = torch.zeros(first.shape, dtype=torch.float64)
        for read_other, weight in zip(reads[1:], weights[1:], strict=True):
            _add_difference(change, read_other(name), first, weight)
        mean = torch.empty(first.shape, dtype=dtype)
        for out, ours, by in zip(_chunks(mean), _chunks(first), _chunks(change), strict=True):
            # -0.0 + 0.0 is 0.0, and the sign should stay.
            out.copy_(round_once(torch.where(by == 0, ours.double(), ours.double() + by), dtype))
        if found := first_not_finite(mean):
            raise UserError(f"the mean of {name} is beyond the range of {dtype}: {found}; give other weights")
        return mean

    return read


def _add_difference(change: Tensor, other: Tensor, first: Tensor, weight: float) -> None:
    for total, theirs, ours in zip(_chunks(change), _chunks(other), _chunks(first), strict=True):
        total.add_(torch.sub(theirs.double(), ours.double()), alpha=weight)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(CHUNK)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp64 to the nearest value of another dtype, ties to even.

    torch converts fp64 to bf16 and fp16 through fp32, and so rounds twice: 1 + 2^-8 + 2^-40 becomes 1 instead
    of 1 + 2^-7 in bf16.
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    # Rounding to odd: a value that fp32 cannot represent becomes the one of its two neighbors whose last bit
    # is 1. That bit says which side of a tie of the narrower dtype the value is on.
    nearest = values.float()
    bits = nearest.view(torch.int32)
    bits -= (nearest.double().abs() > values.abs()).int()  # one less is the neighbor towards zero
    bits |= (nearest.double() != values).int()
    return nearest.to(dtype)

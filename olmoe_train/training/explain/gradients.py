"""Each document's share of the gradient of one optimizer step, by a backward pass per document.

The gradient of a step is a sum: of the cross-entropy of every document, and of the routers' losses. The share
of a part g_i of the sum g is <g_i, g> / |g|^2. Shares add up to 1; a part that pulls against the others has a
negative one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from olmoe_train.distributed.mesh import copies, local_tensor
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.training.batch import Batch, Totals, count_tokens, to_device
from olmoe_train.training.explain.documents import Key, StepDocuments, as_in_training
from olmoe_train.training.objectives.base import Objective


@dataclass(frozen=True)
class GradientPart:
    """One part of the step's gradient."""

    share: float
    """<part, whole> / |whole|^2. NaN: the gradient is not finite, or 0."""
    norm: float
    """2-norm of the part by itself."""


@dataclass(frozen=True)
class StepGradient:
    """The gradient of a step and its parts; equal on every rank."""

    norm: float
    """Global 2-norm, before clipping: train/grad_norm."""
    terms: dict[str, float]
    """Loss of the step and its named terms, unweighted, as metrics.jsonl has them."""
    cross_entropy: GradientPart
    """All documents together."""
    documents: dict[Key, GradientPart]
    """The documents that were asked for."""

    @property
    def router_share(self) -> float:
        """Share of the routers' losses."""
        return 1.0 - self.cross_entropy.share

    @property
    def others_share(self) -> float:
        """Share of the documents that were not asked for, together."""
        return self.cross_entropy.share - math.fsum(part.share for part in self.documents.values())


def step_gradient(
    model: OlmoeForCausalLM,
    objective: Objective,
    step: StepDocuments,
    keys: list[Key],
    device: torch.device,
    progress: Callable[[Iterable[Key]], Iterable[Key]] = iter,
) -> StepGradient:
    """Compute the gradient of a step, and that of some of its documents. Collective.

    Besides the gradients of a training step, memory holds one more gradient, fp32, sharded alike.

    Args:
        model: Parallelized (distributed/parallelize.py). Its gradients are cleared.
        objective: Next-token prediction with this model.
        step: This rank's sequences.
        keys: The documents, equal on every rank.
        device: The device of this rank.
        progress: Wraps the documents.
    """
    with as_in_training(model):
        micro_batches = [batch for batch, _, _ in step.micro_batches()]
        totals = count_tokens(micro_batches, False, device)
        micro_batches = [to_device(batch, device) for batch in micro_batches]
        terms = _backward_of_the_step(model, objective, micro_batches, totals)
        whole = _Whole(model)
        for batch in micro_batches:
            _backward(model, model.training_forward(**batch).ce_sum / totals.num_targets)
        cross_entropy = whole.compare()
        parts = {}
        for key in progress(keys):
            _backward_of_a_document(model, step, key, totals, device)
            parts[key] = whole.compare()
    return StepGradient(whole.norm, terms, cross_entropy, parts)


def _backward(model: OlmoeForCausalLM, loss: Tensor) -> None:
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(True)
    loss.backward()


def _backward_of_the_step(
    model: OlmoeForCausalLM, objective: Objective, micro_batches: list[Batch], totals: Totals
) -> dict[str, float]:
    """Accumulate the gradient of the step as training does. Returns the loss and its terms. Collective."""
    totals = objective.begin_step(model, micro_batches, totals, logged=True)
    sums: dict[str, Tensor] = {}
    for batch in micro_batches:
        loss, named = objective(model, batch, totals)
        _backward(model, loss)
        for name, term in {"loss": loss, **named}.items():
            sums[name] = sums.get(name, torch.zeros_like(loss)) + term.detach()
    values = torch.stack(list(sums.values()))
    dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))


def _backward_of_a_document(
    model: OlmoeForCausalLM, step: StepDocuments, key: Key, totals: Totals, device: torch.device
) -> None:
    """Accumulate the gradient of one document. Ranks without it run a sequence without targets."""
    rows = step.sequences_of(key)
    rounds = torch.tensor(len(rows))
    dist.all_reduce(rounds, dist.ReduceOp.MAX)
    for number in range(int(rounds)):
        own = number < len(rows)
        batch = step.only_targets_of(rows[number] if own else 0, key if own else None)
        output = model.training_forward(**to_device(batch, device))
        _backward(model, output.ce_sum / totals.num_targets)


class _Whole:
    """The whole gradient, taken from a model, to compare its parts with."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        self._shares = [1 / copies(parameter) for parameter in self._parameters]
        self._model = model
        self._whole = self._take()
        self._square, _ = self._products(self._whole)
        self.norm = math.sqrt(self._square)

    def compare(self) -> GradientPart:
        """Compare the gradient that the model holds now, and clear it. Collective."""
        inner, square = self._products(self._take())
        share = inner / self._square if self._square else math.nan
        return GradientPart(share, math.sqrt(square))

    def _take(self) -> list[Tensor]:
        taken = [
            torch.zeros_like(local_tensor(p)) if p.grad is None else local_tensor(p.grad)
            for p in self._parameters
        ]
        self._model.zero_grad(set_to_none=True)
        return taken

    def _products(self, part: list[Tensor]) -> tuple[float, float]:
        """(Inner product with the whole, squared norm), over all ranks."""
        sums = torch.zeros(2, dtype=torch.float64)
        for share, whole, mine in zip(self._shares, self._whole, part, strict=True):
            for place, other in enumerate((whole, mine)):
                product = (mine.float() * other.float()).sum(dtype=torch.float64)
                sums[place] += share * product.cpu()
        dist.all_reduce(sums)
        inner, square = sums.tolist()
        return inner, square

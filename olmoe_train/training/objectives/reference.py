"""The reference of a preference loss: stored log-probabilities, a second model, or the model without its
adapter.

Shapes: N documents of a micro-batch, D documents of a split.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from olmoe_train.data.preferences import MISMATCHED
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.add import adapter_off
from olmoe_train.training.batch import Batch
from olmoe_train.training.objectives.log_probs import (
    completion_log_probs,
    split_log_probs,
    without_dropout,
)
from olmoe_train.training.objectives.preference_data import ValidationSource


class Reference(Protocol):
    """Summed log-probabilities of completions under the reference, fp64, without gradient."""

    def of_batch(self, model: OlmoeForCausalLM, batch: Batch, prefix: str = "") -> Tensor:
        """[N], of a micro-batch on the device. Collective.

        Args:
            model: The model that is trained.
            batch: The columns of CollatePreferences.
            prefix: As for completion_log_probs.
        """

    def of_validation(
        self,
        model: OlmoeForCausalLM,
        source: ValidationSource,
        batches: Callable[[], Iterable[Batch]],
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None]:
        """([D], and the same of the mismatched completions, if there are any), on the CPU. Collective.

        Args:
            model: The model that is trained.
            source: The validation split.
            batches: Returns this rank's micro-batches of it.
            device: The device of this rank.
        """


class NoReference:
    """Zeros, for simpo and orpo."""

    def of_batch(self, model: OlmoeForCausalLM, batch: Batch, prefix: str = "") -> Tensor:
        return torch.zeros_like(batch["document_ids"], dtype=torch.float64)

    def of_validation(
        self,
        model: OlmoeForCausalLM,
        source: ValidationSource,
        batches: Callable[[], Iterable[Batch]],
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None]:
        return torch.zeros(source.documents, dtype=torch.float64), None


@dataclass(frozen=True)
class CachedReference:
    """Log-probabilities that were computed before the first step. D counts the documents of all sources."""

    train_D: Tensor
    """On the device."""
    train_mismatched_D: Tensor | None
    validation_D: Tensor
    """On the CPU."""
    validation_mismatched_D: Tensor | None

    def of_batch(self, model: OlmoeForCausalLM, batch: Batch, prefix: str = "") -> Tensor:
        stored_D = self.train_mismatched_D if prefix == MISMATCHED else self.train_D
        assert stored_D is not None
        return stored_D[batch["document_ids"]]

    def of_validation(
        self,
        model: OlmoeForCausalLM,
        source: ValidationSource,
        batches: Callable[[], Iterable[Batch]],
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None]:
        which = slice(source.first_document, source.first_document + source.documents)
        mismatched_D = self.validation_mismatched_D
        return self.validation_D[which], None if mismatched_D is None else mismatched_D[which]


ReferenceModel = Callable[[OlmoeForCausalLM], AbstractContextManager[OlmoeForCausalLM]]
"""Model that is trained -> the reference model, within a block."""


def second_model(reference: OlmoeForCausalLM) -> ReferenceModel:
    """A frozen model in the same layout."""

    @contextmanager
    def within(model: OlmoeForCausalLM) -> Iterator[OlmoeForCausalLM]:
        yield reference

    return within


@contextmanager
def model_without_adapter(model: OlmoeForCausalLM) -> Iterator[OlmoeForCausalLM]:
    """The model itself, with its adapter off."""
    with adapter_off(model):
        yield model


class LiveReference:
    """A reference model that runs in every step. Validation data is read once: the reference does not
    change."""

    def __init__(self, reference_model: ReferenceModel) -> None:
        self._reference_model = reference_model
        self._validation: dict[str, tuple[Tensor, Tensor | None]] = {}

    @torch.no_grad()
    def of_batch(self, model: OlmoeForCausalLM, batch: Batch, prefix: str = "") -> Tensor:
        with self._reference_model(model) as reference, without_dropout(reference):
            return completion_log_probs(reference, batch, prefix)[0]

    def of_validation(
        self,
        model: OlmoeForCausalLM,
        source: ValidationSource,
        batches: Callable[[], Iterable[Batch]],
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None]:
        if source.name not in self._validation:
            with self._reference_model(model) as reference:
                found = split_log_probs(reference, batches(), source.first_document, source.documents, device)
            self._validation[source.name] = found.sum_D, found.mismatched_D
        return self._validation[source.name]

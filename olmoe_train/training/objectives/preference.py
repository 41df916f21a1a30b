"""Preference tuning: a loss of pairs of completions, or of completions with labels, plus the routers' losses.

Shapes: N documents of a micro-batch: chosen and rejected completions in turn, or completions with labels.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.choices import PreferenceKind
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.mixture import VALIDATION
from olmoe_train.data.preferences import MISMATCHED
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.training.batch import Batch, Totals
from olmoe_train.training.objectives.base import Heartbeat, RouterSums, Validation
from olmoe_train.training.objectives.log_probs import (
    SplitLogProbs,
    completion_log_probs,
    split_log_probs,
    without_dropout,
)
from olmoe_train.training.objectives.preference_data import validation_batches, validation_sources
from olmoe_train.training.objectives.preference_losses import (
    Completions,
    kto_losses,
    kto_metrics,
    pair_losses,
    pair_metrics,
)
from olmoe_train.training.objectives.reference import Reference
from olmoe_train.training.objectives.router_terms import RouterTerms

REFERENCE = "reference"
"""Column that begin_step adds: the reference's log-probabilities, fp64 [N]."""


class Preference:
    """loss = mean over the pairs (or completions) of the global batch + the routers' losses.

    A router loss is a mean over the unpadded tokens of both completions.
    """

    columns: tuple[str, ...] = (
        "input_ids",
        "targets",
        "target_positions",
        "target_ids",
        "completion_lengths",
        "document_ids",
        "wanted",
    )

    def __init__(
        self,
        cfg: PreferenceConfig,
        model: OlmoeForCausalLM,
        reference: Reference,
        samples_per_step: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            cfg: Kind and coefficients.
            model: The model to train, with its balancer.
            reference: The reference's log-probabilities.
            samples_per_step: Pairs, or completions with labels, of the global batch.
            device: The device of this rank.
        """
        self.cfg, self.reference, self.device = cfg, reference, device
        self.samples = samples_per_step
        self._routers = RouterTerms(model, device)
        self._kto = cfg.kind is PreferenceKind.kto
        self._z = torch.zeros((), device=device)
        self._labels_2 = torch.ones(2, device=device)  # unwanted and wanted completions of the step

    @property
    def router(self) -> RouterSums:
        return self._routers.sums

    def begin_step(
        self, model: OlmoeForCausalLM, micro_batches: list[Batch], totals: Totals, logged: bool
    ) -> Totals:
        self._routers.begin_step(model, micro_batches, logged)
        for batch in micro_batches:
            batch[REFERENCE] = self.reference.of_batch(model, batch)
        if self._kto:
            self._estimate_divergence(model, micro_batches)
        return totals

    @torch.no_grad()
    def _estimate_divergence(self, model: OlmoeForCausalLM, micro_batches: list[Batch]) -> None:
        """z: mean of s - r over the mismatched completions of the global batch, at least 0; collective."""
        sums_3 = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            with without_dropout(model):
                sum_N, _ = completion_log_probs(model, batch, MISMATCHED)
            reference_N = self.reference.of_batch(model, batch, MISMATCHED)
            wanted = batch["wanted"].sum()
            sums_3 += torch.stack([(sum_N - reference_N).sum(), len(sum_N) - wanted, wanted])
        dist.all_reduce(sums_3)
        self._z = (sums_3[0] / self.samples).clamp(min=0)
        self._labels_2 = sums_3[1:]

    def __call__(
        self, model: OlmoeForCausalLM, micro_batch: Batch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sum_N, router = completion_log_probs(model, micro_batch)
        completions = Completions(sum_N, micro_batch[REFERENCE], micro_batch["completion_lengths"].double())
        if self._kto:
            loss, terms = self._kto_share(completions, micro_batch["wanted"])
        else:
            loss, terms = self._pair_share(completions)
        loss, router_terms = self._routers.add(loss.float(), router, totals)
        return loss, {name: term.float() for name, term in terms.items()} | router_terms

    def _pair_share(self, completions: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = completions.select(slice(0, None, 2)), completions.select(slice(1, None, 2))
        loss = pair_losses(self.cfg, chosen, rejected).sum() / self.samples
        terms = {"preference_loss": loss}
        if self.cfg.sft_weight:
            sft_loss = -chosen.mean.sum() / self.samples
            terms["sft_loss"] = sft_loss
            loss = loss + self.cfg.sft_weight * sft_loss
        metrics = pair_metrics(self.cfg, chosen, rejected)
        return loss, terms | {name: value_N.sum() / self.samples for name, value_N in metrics.items()}

    def _kto_share(self, completions: Completions, wanted_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = kto_losses(self.cfg, completions, wanted_N, self._z).sum() / self.samples
        metrics = kto_metrics(self.cfg, completions, wanted_N, self._labels_2)
        kl = self._z * (len(wanted_N) / self.samples)  # the shares add up to z
        return loss, {"preference_loss": loss, "kl": kl} | metrics

    def end_step(self, model: OlmoeForCausalLM, totals: Totals, skipped: Tensor) -> None:
        self._routers.end_step(skipped)

    def validate(
        self, model: OlmoeForCausalLM, data: TrainingData, cfg: EvaluationConfig, with_heartbeat: Heartbeat
    ) -> dict[str, Validation]:
        parts: dict[str, tuple[SplitLogProbs, Tensor, Tensor | None]] = {}
        for source in validation_sources(data):
            batches = partial(validation_batches, source, data, cfg, cfg.max_sequences)
            numbers = (source.first_document, source.documents, self.device)
            found = split_log_probs(model, with_heartbeat(batches()), *numbers)
            parts[source.name] = found, *self.reference.of_validation(model, source, batches, self.device)
        results = {name: self._validation([part]) for name, part in parts.items()}
        return results | {VALIDATION: self._validation(list(parts.values()))}

    def _validation(self, parts: list[tuple[SplitLogProbs, Tensor, Tensor | None]]) -> Validation:
        """Loss and metrics of whole splits, computed on the host from every document's log-probabilities."""
        visited = [part.tokens_D > 0 for part, _, _ in parts]

        def joined(columns: list[Tensor]) -> Tensor:
            return torch.cat([column_D[seen_D] for column_D, seen_D in zip(columns, visited, strict=True)])

        completions = Completions(
            joined([part.sum_D for part, _, _ in parts]),
            joined([reference_D for _, reference_D, _ in parts]),
            joined([part.tokens_D for part, _, _ in parts]),
        )
        if not self._kto:
            chosen, rejected = completions.select(slice(0, None, 2)), completions.select(slice(1, None, 2))
            losses_N = pair_losses(self.cfg, chosen, rejected) - self.cfg.sft_weight * chosen.mean
            metrics = pair_metrics(self.cfg, chosen, rejected)
            values = {"loss": losses_N} | metrics
            return Validation(
                {name: value_N.mean().item() for name, value_N in values.items()}, f"{len(losses_N):,} pairs"
            )
        wanted_N = joined([part.wanted_D for part, _, _ in parts])
        gains = [part.mismatched_D - reference_D for part, _, reference_D in parts]  # type: ignore[operator]
        z = joined(gains).mean().clamp(min=0)
        losses_N = kto_losses(self.cfg, completions, wanted_N, z)
        labels_2 = torch.stack([(~wanted_N).sum(), wanted_N.sum()])
        shares = kto_metrics(self.cfg, completions, wanted_N, labels_2)
        values = {"loss": losses_N.mean(), "kl": z} | shares
        count = f"{len(losses_N):,} completions"
        return Validation({name: value.item() for name, value in values.items()}, count)

"""Explains spikes while the run goes on: run_dir/spikes/step-XXXXXXXX.json names the documents of the step.

Nothing is computed or read in a step that is not logged. In a logged step, when logging has waited for the
device, the judgements of the skip guard since the last logged step are read. The batch of an earlier step is
read again from the data: its samples are a function of the seed and the index.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import RankMicroBatches, TrainingData
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.optim.skip_step import ENOUGH, REASONS, WINDOW, SkipGuard
from olmoe_train.run.watchdog import Watchdog
from olmoe_train.training.batch import StepBatches
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.explain.content import as_json, document_records, missing_origins, where
from olmoe_train.training.explain.documents import StepDocuments, step_losses
from olmoe_train.training.state import TrainState
from olmoe_train.training.throughput import Throughput
from olmoe_train.utils.finite import finite_or_none

log = logging.getLogger(__name__)
SPIKES = "spikes"
MOST = 20
"""Steps of a run that are explained."""
CLOSELY = 20
"""Documents of a step with text and routing."""
SIGMAS = 6.0
"""Standard deviations above the mean of the last WINDOW steps that make a spike of a step that the guard does
not judge (trainer.spike_sigmas=null)."""


class Spikes(Callback):
    """Sees spikes on logged steps, and explains them with the live weights."""

    def __init__(
        self,
        run_dir: Path,
        guard: SkipGuard,
        model: OlmoeForCausalLM,
        data: TrainingData,
        batches: StepBatches,
        throughput: Throughput,
        watchdog: Watchdog,
        *,
        sizes: BatchSizes,
        micro_batch_size: int,
        with_routing: bool,
        device: torch.device,
    ) -> None:
        """with_routing: whether routers can be recorded; in compiled layers they cannot."""
        self.directory, self.guard, self.model, self.data = run_dir / SPIKES, guard, model, data
        self.batches, self.throughput, self.watchdog = batches, throughput, watchdog
        self.sizes, self.micro_batch_size = sizes, micro_batch_size
        self.with_routing, self.device = with_routing, device
        self.judged = self.judged_samples = self.explained = 0

    def on_start(self, state: TrainState) -> None:
        self.judged, self.judged_samples = state.step, state.samples
        count = torch.tensor(len(list(self.directory.glob("step-*.json"))) if dist.get_rank() == 0 else 0)
        dist.all_reduce(count)
        self.explained = int(count)

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if not report.is_logged:
            return
        outcomes = self.guard.outcomes.tolist()
        history = np.array(self.guard.history.tolist())
        spikes = find_spikes(self.judged, state.step, outcomes, history, self.guard.sigmas is not None)
        for step, why in list(spikes.items())[: max(0, MOST - self.explained)]:
            skipped_since = all(outcomes[s % WINDOW] in REASONS for s in range(step, state.step + 1))
            self._explain(step, why, state, skipped_since, history[:, step % WINDOW].tolist())
            self.explained += 1
            if self.explained == MOST:
                log.warning("WARNING: %d steps are explained in %s; no more will be", MOST, self.directory)
        self.judged, self.judged_samples = state.step, state.samples
        if spikes:
            self.throughput.restart(state.tokens)

    def _explain(
        self, step: int, why: str, state: TrainState, same_weights: bool, values: list[float]
    ) -> None:
        """Write the file of one step. Collective.

        Args:
            step: The step to explain.
            why: Why it is explained.
            state: The position of the run, `step` or later.
            same_weights: Whether the weights are those with which the step was computed.
            values: The guard's loss and gradient norm of the step.
        """
        content: dict[str, Any] = {"step": step, "why": why, "skipped": why in REASONS.values()}
        if not content["skipped"]:  # of a skipped step, the guard keeps the limit in place of the value
            content |= {"loss": finite_or_none(values[0]), "grad_norm": finite_or_none(values[1])}
        content["weights"] = {"after_step": state.step, "exact": same_weights}
        if not self.batches.from_data:
            content |= {"documents": [], "notes": ["the batches were given to train(batches=...)"]}
            self._write(step, content, "its batch was given to train(batches=...), so no document is known")
            return
        first = self.sizes.samples_after(step - 1 - self.judged, self.judged_samples)
        rank, world = dist.get_rank(), dist.get_world_size()
        order = RankMicroBatches(first, self.sizes, rank, world, self.micro_batch_size)
        samples = self.data.samples
        documents = StepDocuments(samples, order.of_one_step())

        def with_heartbeat(items: Any) -> Iterator[Any]:
            return self.watchdog.with_heartbeat(items, f"explaining step {step}")

        losses = step_losses(self.model, documents, self.device, with_heartbeat, self.with_routing)
        closely = [document.key for document in losses.documents[:CLOSELY]]
        routing = losses.routing(closely)
        if dist.get_rank() != 0:
            return
        records = document_records(samples, losses, closely, routing)
        content |= {
            "ce_loss": finite_or_none(losses.ce_loss),
            "targets": losses.targets,
            "samples": [first, first + self.sizes.after(first)],
            "documents": records,
            "notes": missing_origins(samples),
        }
        self._write(step, content, describe(records[0], losses.ce_loss))

    def _write(self, step: int, content: dict[str, Any], found: str) -> None:
        if dist.get_rank() != 0:
            return
        path = self.directory / f"step-{step:08d}.json"
        with _unharmed_by_a_full_disk(path):
            self.directory.mkdir(exist_ok=True)
            path.write_text(as_json(content), encoding="utf-8")
            log.warning("WARNING: step %d: %s; %s (%s)", step, content["why"], found, path)


@contextmanager
def _unharmed_by_a_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.warning("WARNING: %s cannot be written: %s", path, error.strerror)


def describe(record: dict[str, Any], ce_loss: float) -> str:
    """One clause about the most conspicuous document of a step. ce_loss: in nats per target token."""
    share = record["loss_share"]
    if share is None or not math.isfinite(ce_loss):
        return f"first document without a finite loss: {where(record)}"
    per_token = f"{record['loss_per_token']:.2f} nats per token"
    return f"{where(record)} has {share / ce_loss:.0%} of the loss, with {per_token}"


def find_spikes(
    judged: int, step: int, outcomes: list[int], history: np.ndarray, guard_judges: bool
) -> dict[int, str]:
    """Find the spikes among the steps (judged, step], of which the guard remembers the last WINDOW.

    Args:
        judged: The last step that was looked at before.
        step: The current step.
        outcomes: SkipGuard.outcomes.
        history: SkipGuard.history, loss and gradient norm [2, WINDOW]; NaN where nothing finite is known.
        guard_judges: Whether the guard skips spikes. Otherwise steps more than SIGMAS standard deviations
            above the mean of those before count as spikes.

    Returns:
        Step -> why it is one.
    """
    found: dict[int, str] = {}
    oldest = max(1, step - WINDOW + 1)
    for number in range(max(judged + 1, oldest), step + 1):
        outcome = outcomes[number % WINDOW]
        if outcome in REASONS:
            found[number] = REASONS[outcome]
        elif not guard_judges and _is_above(history, number, oldest):
            found[number] = f"loss or gradient norm is {SIGMAS:g} standard deviations above the mean"
    return found


def _is_above(history: np.ndarray, step: int, oldest: int) -> bool:
    """Whether loss or gradient norm of `step` is far above those of the steps [oldest, step)."""
    before = history[:, np.arange(oldest, step) % WINDOW]
    for value, values in zip(history[:, step % WINDOW], before, strict=True):
        known = values[np.isfinite(values)]
        if len(known) >= ENOUGH and value > known.mean() + SIGMAS * known.std():
            return True
    return False

"""A step's values by their names in metrics.jsonl, over the whole global batch.

Shapes: L layers, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.run.metrics_registry import find_metric
from olmoe_train.training.batch import Totals
from olmoe_train.training.objectives.base import RouterSums


class StepTerms:
    """Sums of the loss and its named terms over this rank's micro-batches of one step, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        """This rank's share of the step's loss."""
        self.named: dict[str, Tensor] = {}
        """This rank's share of each term that the objective names."""

    @torch.no_grad()
    def add(self, loss: Tensor, named: dict[str, Tensor]) -> None:
        self.loss += loss
        for name, term in named.items():
            self.named[name] = self.named.get(name, torch.zeros_like(self.loss)) + term

    def stacked(self) -> tuple[list[str], Tensor]:
        """(Names in metrics.jsonl, their values in one tensor)."""
        names = ["train/loss", *map(metric_name, self.named)]
        return names, torch.stack([self.loss, *self.named.values()])


def metric_name(term: str) -> str:
    """Name of an objective's term in metrics.jsonl: TERM if that is a metric's name, else train/TERM."""
    return term if find_metric(term) is not None or "/" in term else f"train/{term}"


def read_step(terms: StepTerms, router: RouterSums, grad_norm: Tensor) -> dict[str, Any]:
    """train/* and router/* of a step. Waits for the device; collective."""
    names, values_N = terms.stacked()
    layers, experts = router.counts_LE.shape
    sums = torch.cat([values_N, router.counts_LE.flatten(), router.entropy_L, router.z_L])
    dist.all_reduce(sums)
    losses, counts, entropy_L, z_L = sums.cpu().split([len(names), layers * experts, layers, layers])
    load_LE = counts.view(layers, experts)
    violation_L = load_LE.max(-1).values / load_LE.mean(-1).clamp(min=1e-9) - 1
    values: dict[str, Any] = dict(zip(names, losses.tolist(), strict=True))
    values["train/grad_norm"] = grad_norm.item()
    values["router/max_violation"] = violation_L.max().item()
    values["router/entropy"] = entropy_L.mean().item()
    for layer in range(layers):
        prefix = f"router/layer_{layer:02d}"
        values[f"{prefix}/max_violation"] = violation_L[layer].item()
        values[f"{prefix}/entropy"] = entropy_L[layer].item()
        values[f"{prefix}/z"] = z_L[layer].item()
        values[f"{prefix}/load"] = (load_LE[layer] / load_LE[layer].sum().clamp(min=1)).tolist()
    return values


class ExpertUse:
    """The last step in which each layer sent any token to each expert: which experts are dead."""

    def __init__(
        self,
        layers: int,
        experts: int,
        dead_after: int,
        last_used: list[list[int]] | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            dead_after: steps without a token after which an expert counts as dead.
            last_used: [L][E] as a checkpoint holds it; None for a new run.
        """
        self.dead_after = dead_after
        self.last_used_LE = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        if last_used is not None:
            self.last_used_LE += torch.tensor(last_used, device=device)

    def update(self, step: int, counts_LE: Tensor) -> None:
        """counts_LE: this rank's tokens of `step`."""
        self.last_used_LE.masked_fill_(counts_LE > 0, step)

    def last_used(self) -> list[list[int]]:
        """[L][E], over all ranks; collective."""
        last_used_LE = self.last_used_LE.clone()
        dist.all_reduce(last_used_LE, dist.ReduceOp.MAX)
        return last_used_LE.tolist()

    def read(self, step: int) -> dict[str, int]:
        """router/*dead_experts at `step`; collective."""
        dead_L = [sum(step - used >= self.dead_after for used in layer) for layer in self.last_used()]
        values = {"router/dead_experts": sum(dead_L)}
        return values | {f"router/layer_{layer:02d}/dead_experts": dead for layer, dead in enumerate(dead_L)}


class DataCounts:
    """Counts of the sequences since they were last read: data/*."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self._reset()

    def _reset(self) -> None:
        self.positions = self.tokens = self.without_targets = self.repetitive = 0

    def add(self, totals: Totals) -> None:
        """Count one step's global batch."""
        self.positions += totals.num_positions
        self.tokens += totals.num_tokens_host
        self.without_targets += totals.sequences_without_targets
        self.repetitive += totals.repetitive_sequences

    def read(self) -> dict[str, float]:
        """The counts since the last call; they start again."""
        values: dict[str, float] = {"data/sequences_without_targets": self.without_targets}
        if self.data.repetition_filter:
            values["data/repetitive_sequences"] = self.repetitive
        if self.data.packing is not Packing.concat:
            values["data/padding"] = 1 - self.tokens / self.positions
        self._reset()
        return values

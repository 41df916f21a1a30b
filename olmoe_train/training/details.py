"""The costly values of a step: losses by source and position, and the routing flow.

logging.details_every selects the steps. Shapes: B batch, S sequence, T tokens (B x S), E experts, K top-k,
L layers, P parts of the sequence, N sources.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.mixture import has_sources, mixture_components
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.cross_entropy import IGNORE_INDEX
from olmoe_train.model.loss_record import POSITION_PARTS, mean_losses, record_target_losses, sums_by_position
from olmoe_train.model.moe.routing_record import record_routing
from olmoe_train.model.outputs import TrainingOutput


def is_due(step: int, every: int, log_every: int, last_step: int) -> bool:
    """Whether the costly values of a step are measured: at the first logged step from each multiple of
    `every` on, and at the last step of the run."""
    if every == 0 or step == last_step:
        return every > 0
    return step % log_every == 0 and step // every > (step - log_every) // every


class StepDetails:
    """Observes the training passes of the steps that are due. A step stays bit for bit the same."""

    def __init__(
        self,
        model: OlmoeForCausalLM,
        data: TrainingData,
        *,
        every: int,
        log_every: int,
        last_step: int,
        sizes: BatchSizes,
        micro_batch_size: int,
        with_flow: bool,
        device: torch.device,
    ) -> None:
        """
        Args:
            model: As the objective calls it.
            data: The data of the run; its order says which source each sequence is of.
            every: logging.details_every.
            log_every: trainer.log_every.
            last_step: Of the whole run.
            sizes: Sequences per step, over all ranks.
            micro_batch_size: Sequences per pass of one rank.
            with_flow: Whether to count the routing flow, which only pictures show.
            device: The device of this rank.
        """
        self._model, self._data, self._device = model, data, device
        self._every, self._log_every, self._last_step = every, log_every, last_step
        self._sizes, self._micro_batch = sizes, micro_batch_size
        config = model.config
        self._pairs, self._experts = config.num_hidden_layers - 1, config.num_experts
        # With expert choice a token has no first choice.
        has_flow = config.routing == "token_choice" and self._experts > 1 and self._pairs > 0
        self._with_flow = with_flow and has_flow
        self._sources = (
            [source.name for source in mixture_components(data.cfg)] if has_sources(data.cfg) else []
        )
        self._parts = min(POSITION_PARTS, data.cfg.sequence_length)
        self._observing = False
        self._passes = self._first_sample = 0
        self._reset()
        self._forward = model.training_forward
        if every:
            model.training_forward = self._observed  # type: ignore[method-assign]

    def _reset(self) -> None:
        self._has_losses = False
        self._position_P2, self._source_N2 = (
            torch.zeros(rows, 2, dtype=torch.float64, device=self._device)
            for rows in (self._parts, len(self._sources))
        )
        cells = self._pairs * self._experts**2 if self._with_flow else 0
        self._flow = torch.zeros(cells, device=self._device)

    def is_due(self, step: int) -> bool:
        """Whether the costly values of a step are measured, and pictures drawn."""
        return is_due(step, self._every, self._log_every, self._last_step)

    def prepare(self, step: int, samples: int) -> None:
        """Say which step comes next.

        Args:
            step: Its number.
            samples: Sequences drawn before it, over all ranks.
        """
        self._observing = self.is_due(step)
        share = self._sizes.after(samples) // dist.get_world_size()
        self._passes, self._first_sample = 0, samples + dist.get_rank() * share

    def _observed(self, *args: Any, **inputs: Any) -> TrainingOutput:
        # Passes without gradients are no training: validation, references, expert counts of the whole batch.
        if not self._observing or not torch.is_grad_enabled():
            return self._forward(*args, **inputs)
        with record_target_losses(self._model) as chunks, record_routing(self._model) as passes_L:
            output = self._forward(*args, **inputs)
        with torch.no_grad():
            # An objective that asks for log-probabilities (target_positions) does not use the cross-entropy.
            if chunks and inputs.get("targets") is not None:
                self._add_losses(torch.cat(chunks), inputs["targets"])
            if self._with_flow:
                self._add_flow([passes[0] for passes in passes_L], inputs.get("attention_mask"))
        self._passes += 1
        return output

    def _add_losses(self, losses_T: Tensor, targets_BS: Tensor) -> None:
        losses_BS, is_target_BS = losses_T.view_as(targets_BS), targets_BS != IGNORE_INDEX
        self._has_losses = True
        self._position_P2 += sums_by_position(losses_BS, is_target_BS, self._parts)
        if self._sources:
            first = self._first_sample + self._passes * self._micro_batch
            locate = self._data.samples.schedule.locate
            sources = [locate(first + row)[0] for row in range(len(losses_BS))]
            source_B = torch.tensor(sources).to(self._device, non_blocking=True)
            sums_B2 = torch.stack([losses_BS.double().sum(1), is_target_BS.sum(1).double()], 1)
            self._source_N2.index_add_(0, source_B, sums_B2)

    def _add_flow(self, indices_LTK: list[Tensor], mask_BS: Tensor | None) -> None:
        """Count the tokens from expert i of a layer to expert j of the next, by their first choices."""
        first_T = indices_LTK[0][:, 0]
        weight_T = torch.ones(len(first_T), device=self._device)
        if mask_BS is not None:
            weight_T = mask_BS.flatten().float()
        for pair, indices_TK in enumerate(indices_LTK[1:]):
            cell_T = (pair * self._experts + first_T) * self._experts + indices_TK[:, 0]
            self._flow.scatter_add_(0, cell_T, weight_T)
            first_T = indices_TK[:, 0]

    def read(self) -> tuple[dict[str, Any], Tensor | None]:
        """What the observed step added up to, over all ranks; collective. Nothing where none was observed.

        Returns:
            (metrics by name; routing flow, fp32 [L - 1, E, E] on the CPU: tokens by first choice in a layer
            and in the next layer. None: not counted).
        """
        if not self._observing:
            return {}, None
        values: dict[str, Any] = {}
        if self._has_losses:  # equal on all ranks: it depends on the objective
            sums_M2 = torch.cat([self._position_P2, self._source_N2])
            dist.all_reduce(sums_M2)
            means = mean_losses(sums_M2.tolist())
            values["train/loss_by_position"], of_sources = means[: self._parts], means[self._parts :]
            for name, mean in zip(self._sources, of_sources, strict=True):
                values[f"data/{name}/loss"] = mean
        flow = None
        if self._with_flow:
            dist.all_reduce(self._flow)
            flow = self._flow.view(self._pairs, self._experts, self._experts).cpu()
        self._reset()
        return values, flow

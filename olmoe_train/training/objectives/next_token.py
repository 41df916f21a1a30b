"""Next-token prediction: cross-entropy, plus the routers' losses."""

import torch
from torch import Tensor

from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.evaluation.perplexity import Evaluation, evaluate_data
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.training.batch import Batch, Totals
from olmoe_train.training.objectives.base import Heartbeat, RouterSums, Validation
from olmoe_train.training.objectives.router_terms import RouterTerms


class NextToken:
    """loss = CE + the routers' losses, divided by the global batch's counts.

    CE is divided by the number of target tokens, a router loss by the number of unpadded tokens.
    """

    columns: tuple[str, ...] = ("input_ids", "targets")

    def __init__(self, model: OlmoeForCausalLM, device: torch.device) -> None:
        self._routers, self.device = RouterTerms(model, device), device

    @property
    def router(self) -> RouterSums:
        return self._routers.sums

    def begin_step(
        self, model: OlmoeForCausalLM, micro_batches: list[Batch], totals: Totals, logged: bool
    ) -> Totals:
        self._routers.begin_step(model, micro_batches, logged)
        return totals

    def __call__(
        self, model: OlmoeForCausalLM, micro_batch: Batch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = model.training_forward(**micro_batch)
        ce_loss = output.ce_sum / totals.num_targets
        loss, router_terms = self._routers.add(ce_loss, output.router, totals)
        return loss, {"ce_loss": ce_loss} | router_terms

    def end_step(self, model: OlmoeForCausalLM, totals: Totals, skipped: Tensor) -> None:
        self._routers.end_step(skipped)

    def validate(
        self, model: OlmoeForCausalLM, data: TrainingData, cfg: EvaluationConfig, with_heartbeat: Heartbeat
    ) -> dict[str, Validation]:
        """Loss, perplexity, bits per byte, and the loss by position: eval/SET/loss and so on."""
        results = evaluate_data(model, data.cfg, cfg, self.device, with_heartbeat)
        return {name: validation_of(one) for name, one in results.items()}


def validation_of(one: Evaluation) -> Validation:
    """The metrics of a cross-entropy. There are no bits per byte if the bytes are not known."""
    values: dict[str, float | list[float | None]] = {"loss": one.loss, "perplexity": one.perplexity}
    if one.bits_per_byte is not None:
        values["bits_per_byte"] = one.bits_per_byte
    values["loss_by_position"] = one.loss_by_position
    return Validation(values, f"{one.tokens:,} tokens")

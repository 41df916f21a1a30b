"""The time of a training step from its parts: arithmetic, recomputation, uneven experts, links, and update.

    step = arithmetic + recomputation + imbalance + update + exposed + all-to-all

It compares layouts of the same work. It counts no latency, no congestion, and no loss of efficiency with
small micro-batches. benchmarks/predict_step.py compares it with steps of gloo ranks.
"""

from dataclasses import dataclass, fields

from olmoe_train.config.choices import ActivationCheckpointing
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.flops import FlopsPerToken
from olmoe_train.planning.memory import MicroBatch, RankMemory, recomputed_activations
from olmoe_train.planning.traffic import Links, StepTraffic


@dataclass(frozen=True)
class Rates:
    """How fast one rank works."""

    flops: float
    """FLOP/s of forward and backward: the peak times the share of it that is reached."""
    memory: float
    """Bytes per second of the device's memory."""
    links: Links
    overlap: float = 1.0
    """Part of the time of weights and gradients on the links that can be hidden behind computation."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of one optimizer step on the slowest rank."""

    arithmetic: float
    """Forward and backward, with as many rows on each rank."""
    recomputation: float
    """Of activation checkpointing."""
    imbalance: float
    """What the rank of the busiest expert needs more than the others, in experts and all-to-all."""
    update: float
    """Of the weights, by the optimizer."""
    exposed: float
    """Weights and gradients on the links, as far as computation does not hide them."""
    all_to_all: float
    """Rows to experts of other ranks and back, with as many rows on each rank."""

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, item.name) for item in fields(self))

    def shares(self) -> dict[str, float]:
        """Each part of the step, as a fraction of it, by name."""
        return {item.name: getattr(self, item.name) / self.total for item in fields(self)}


def rank_load(config: OlmoeConfig, expert_parallel_size: int, max_violation: float) -> float:
    """Rows of the rank that has the busiest expert, as a multiple of the mean over ranks.

    The busiest of E experts has 1 + v times the mean, and all others have equal parts of the rest. A rank has
    n of the experts: (1 + v + (n - 1) (1 - v / (E - 1))) / n = 1 + v (E - n) / (n (E - 1)). With EP 8, the
    released model's expert counts give 1.17, 1.33 and 1.22 in its layers 0, 7 and 15; this gives 1.12, 1.22
    and 1.22. Expert choice is balanced.
    """
    experts = config.num_experts
    if expert_parallel_size == 1 or config.routing == "expert_choice":
        return 1.0
    on_rank = experts // expert_parallel_size
    # One rank cannot get more than all rows.
    violation = min(max_violation, experts - 1)
    return 1 + violation * (experts - on_rank) / (on_rank * (experts - 1))


def step_cost(
    config: OlmoeConfig,
    flops: FlopsPerToken,
    batch: MicroBatch,
    micro_batches: int,
    memory: RankMemory,
    traffic: StepTraffic,
    rates: Rates,
) -> StepCost:
    """The time of a step with fsdp or ddp.

    Args:
        config: Architecture of the model.
        flops: Of forward and backward, per token.
        batch: What one rank computes at a time; its load_factor is that of the slowest rank.
        micro_batches: Micro-batches per step and rank.
        memory: Of the rank.
        traffic: Of the step, with even routing.
        rates: How fast a rank works.
    """
    tokens = batch.tokens * micro_batches
    again = recomputed_flops(flops, batch.checkpointing)
    arithmetic = tokens * flops.total / rates.flops
    recomputation = tokens * again.total / rates.flops
    if batch.checkpointing is ActivationCheckpointing.selective:
        # Norms and rotations: each result is written once and read once.
        moved = 2 * recomputed_activations(config, batch) * config.num_hidden_layers * micro_batches
        recomputation += moved / rates.memory
    routed = config.experts_per_token / (config.experts_per_token + config.num_shared_experts)
    of_experts = tokens * routed * (flops.experts + again.experts) / rates.flops
    all_to_all = traffic.all_to_all.seconds
    uneven = (batch.load_factor - 1) * of_experts
    # AdamW reads weights, gradients and two moments, and writes weights and moments.
    moved = 3 * memory.gradients + 2 * memory.optimizer
    weights = traffic.weights_seconds
    hidden = min(rates.overlap * weights, arithmetic + recomputation + uneven)
    return StepCost(
        arithmetic=arithmetic,
        recomputation=recomputation,
        imbalance=uneven + (batch.load_factor - 1) * all_to_all,
        update=moved / rates.memory,
        exposed=weights - hidden,
        all_to_all=all_to_all,
    )


def recomputed_flops(flops: FlopsPerToken, mode: ActivationCheckpointing) -> FlopsPerToken:
    """FLOPs per token that backward repeats: with full, those of the layers' forward pass.

    Forward is a third of the three products of a trained weight, and half of the two of a frozen one. The
    other modes repeat no matrix products.
    """
    if mode is not ActivationCheckpointing.full:
        return FlopsPerToken(0.0, 0.0, 0.0, 0.0, 0.0)
    forward = 1 / 2 if flops.adapter else 1 / 3
    return FlopsPerToken(
        experts=forward * flops.experts,
        attention_projections=forward * flops.attention_projections,
        head=0.0,
        router=forward * flops.router,
        causal_attention=flops.causal_attention / 3,
        adapter=flops.adapter / 3,
    )

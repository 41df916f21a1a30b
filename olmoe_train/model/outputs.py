"""What forward passes return: the documented names of Transformers' OLMoE outputs, and the trainer's own."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from olmoe_train.model.kv_cache import KVCache


@dataclass
class _Output:
    """Read by attribute, by name (`out["logits"]`) or by place among the values that are there (`out[0]`)."""

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, item.name) for item in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class MoeModelOutputWithPast(_Output):
    last_hidden_state: Tensor
    """[B, S, D], after the final norm."""
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """[B, S, D] before each layer, and after the final norm: L + 1."""
    attentions: tuple[Tensor, ...] | None = None
    """[B, heads, S, C] a layer."""
    router_logits: tuple[Tensor, ...] | None = None
    """[T, E] a layer, fp32."""


@dataclass
class MoeCausalLMOutputWithPast(_Output):
    loss: Tensor | None = None
    """Mean cross-entropy of the labels, plus router_aux_loss_coef x aux_loss where router logits are put
    out."""
    aux_loss: Tensor | None = None
    """Load-balancing loss in Transformers' pooled convention (`hf`)."""
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class TrainingOutput:
    """Everything the trainer's losses and router metrics are made of."""

    ce_sum: Tensor
    """Sum of the cross-entropy over target tokens, fp32 scalar."""
    router_logits: tuple[Tensor, ...]
    """[T, E] a layer, fp32."""
    expert_indices: tuple[Tensor, ...]
    """[T, K] a layer, int64: where the tokens went."""

"""Return types of the forward passes: Transformers' OLMoE outputs under their documented names, and the
output for training.

Shapes: B batch, S sequence, C cached + new positions, T tokens (B x S), D hidden, E experts, L layers,
V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from olmoe_train.model.kv_cache import KVCache
from olmoe_train.model.moe.router_stats import RouterStats


@dataclass
class _Output:
    """Fields are read by attribute, by name (`out["logits"]`) or by position (`out[0]`).

    Positions skip the fields that are None.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, item.name) for item in fields(self))
        return tuple(value for value in values if value is not None)

    @property
    def cache(self) -> KVCache | None:
        """The name of `past_key_values` since Transformers 5.24."""
        cache: KVCache | None = self["past_key_values"]
        return cache

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class MoeModelOutputWithPast(_Output):
    """Output of OlmoeModel.forward."""

    last_hidden_state: Tensor
    """[B, S, D], after the final norm."""
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """L + 1 tensors [B, S, D]: one before each layer, and one after the final norm."""
    attentions: tuple[Tensor, ...] | None = None
    """One [B, heads, S, C] tensor per layer: the attention probabilities."""
    router_logits: tuple[Tensor, ...] | None = None
    """One fp32 [T, E] tensor per layer."""


@dataclass
class MoeCausalLMOutputWithPast(_Output):
    """Output of OlmoeForCausalLM.forward.

    A field without a description is the same as in MoeModelOutputWithPast.
    """

    loss: Tensor | None = None
    """Mean cross-entropy per target token; plus router_aux_loss_coef x aux_loss if the output includes the
    router logits."""
    aux_loss: Tensor | None = None
    """Load-balancing loss in Transformers' pooled convention (`hf`, see model/losses.py)."""
    logits: Tensor | None = None
    """[B, S, V], or only the positions selected by `logits_to_keep`."""
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class DecoderOutput:
    """Output of OlmoeModel.run_layers. Everything but the last hidden state is None unless requested."""

    last_hidden_state: Tensor
    """[B, S, D], after the final norm."""
    hidden_states: tuple[Tensor, ...] | None
    """L + 1 tensors [B, S, D]: one before each layer, and one after the final norm."""
    attentions: tuple[Tensor, ...] | None
    """One [B, heads, S, C] tensor per layer: the attention probabilities."""
    router_logits: tuple[Tensor, ...] | None
    """One fp32 [T, E] tensor per layer."""
    router_stats: RouterStats | None
    """Sums over the unpadded tokens, of every layer."""


@dataclass(frozen=True)
class TrainingOutput:
    """Output of OlmoeForCausalLM.training_forward: the input of the training losses and router metrics."""

    ce_sum: Tensor
    """Cross-entropy summed over the target tokens, an fp32 scalar."""
    router: RouterStats
    """Sums over the unpadded tokens, of every layer."""
    log_probs: Tensor | None = None
    """Log-probability of each target, fp32 [P], if positions were asked for; `ce_sum` is then 0."""

"""The OLMoE decoder, with Transformers' module and parameter names (arXiv 2409.02060; model type `olmoe`).

Shapes: B batch, S sequence, T tokens (B x S), D hidden, E experts, K top-k, V vocabulary, L layers, C cached
+ new.

Nothing here knows of ranks: distributed/parallelize.py shards, checkpoints and compiles the modules from
outside.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.attention import (
    OlmoeAttention,
    attention_mask,
    document_mask,
    documents_and_positions,
    has_document_kernel,
)
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.cross_entropy import IGNORE_INDEX, cross_entropy_sum, target_log_probs
from olmoe_train.model.generation import generate
from olmoe_train.model.hf.pretrained import OlmoePreTrainedModel
from olmoe_train.model.initialization import init_weights
from olmoe_train.model.kv_cache import KVCache
from olmoe_train.model.losses import load_balancing_loss
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.model.moe.experts import OlmoeExperts
from olmoe_train.model.norm import OlmoeRMSNorm
from olmoe_train.model.outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast, TrainingOutput
from olmoe_train.model.rope import rotary_cos_sin


class OlmoeDecoderLayer(nn.Module):
    def __init__(self, config: OlmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = OlmoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = OlmoeAttention(config, layer_idx)
        self.post_attention_layernorm = OlmoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = OlmoeSparseMoeBlock(config)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1SC: Tensor | None = None,
        cache: KVCache | None = None,
        output_attentions: bool = False,
        document_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(x_BSD, router logits_TE, expert_indices_TK, attention probabilities or None)."""
        attended_BSD, probs = self.self_attn(
            self.input_layernorm(x_BSD), rotary, mask_B1SC, cache, output_attentions, document_offsets
        )
        x_BSD = x_BSD + attended_BSD
        expert_BSD, logits_TE, indices_TK = self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD + expert_BSD, logits_TE, indices_TK, probs


class OlmoeModel(OlmoePreTrainedModel):
    """Embedding, L decoder layers, final norm. Arguments and outputs as documented for
    transformers.OlmoeModel."""

    def __init__(self, config: OlmoeConfig, init: bool = True) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            config.pad_token_id,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleList(OlmoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = OlmoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        if init:
            _init_unless_meta(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache_position: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """input_ids [B, S] or inputs_embeds [B, S, D]; attention_mask [B, C], 0 at padding. ValueError unless
        exactly one of input_ids and inputs_embeds is given."""
        config = self.config
        use_cache = _given(use_cache, config.use_cache)
        output_attentions = _given(output_attentions, config.output_attentions)
        cache = KVCache() if use_cache and past_key_values is None else past_key_values
        hidden_states, attentions, router_logits, _ = self.run_layers(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            cache_position,
            output_attentions,
        )
        output = MoeModelOutputWithPast(
            last_hidden_state=hidden_states[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=hidden_states
            if _given(output_hidden_states, config.output_hidden_states)
            else None,
            attentions=attentions if output_attentions else None,
            router_logits=router_logits
            if _given(output_router_logits, config.output_router_logits)
            else None,
        )
        return output if _given(return_dict, config.return_dict) else output.to_tuple()

    def run_layers(
        self,
        input_ids: Tensor | None,
        padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        cache_position: Tensor | None = None,
        output_attentions: bool = False,
        document_offsets: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(hidden states before each layer and after the final norm, attention probabilities if asked for,
        router logits, expert indices), each a tuple over layers.

        document_offsets: int32 [documents + 1], where documents start in the B * S tokens laid end to end.
        Each is then by itself: attention and positions know nothing of the others. Padding is one, too.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cached, new = cache.get_seq_length() if cache is not None else 0, x_BSD.shape[1]
        if position_ids is None:
            arange = torch.arange(cached, cached + new, device=x_BSD.device)
            position_ids = (cache_position if cache_position is not None else arange).unsqueeze(0)
        if document_offsets is None:
            mask_B1SC = attention_mask(padding_mask, new, cached + new, x_BSD.device)
        else:
            documents_BS, position_ids = documents_and_positions(document_offsets, *x_BSD.shape[:2])
            # Attention takes either; the mask does anywhere, and costs what all S x S pairs cost.
            by_kernel = has_document_kernel(x_BSD, self.config.attention_dropout)
            mask_B1SC = None if by_kernel else document_mask(documents_BS)
            document_offsets = document_offsets if by_kernel else None
        rotary = rotary_cos_sin(self.config, position_ids, x_BSD.dtype)

        hidden_states, attentions, router_logits, expert_indices = [], [], [], []
        for layer in self.layers:
            hidden_states.append(x_BSD)
            x_BSD, logits_TE, indices_TK, probs = layer(
                x_BSD, rotary, mask_B1SC, cache, output_attentions, document_offsets
            )
            attentions.append(probs)
            router_logits.append(logits_TE)
            expert_indices.append(indices_TK)
        hidden_states.append(self.norm(x_BSD))
        return tuple(hidden_states), tuple(attentions), tuple(router_logits), tuple(expert_indices)


class OlmoeHead(nn.Linear):
    """The output projection; with labels, the summed cross-entropy instead, without [T, V] logits in
    memory. `log_probs` is a plain function, for torch.compile to replace."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.log_probs = target_log_probs

    def forward(self, x: Tensor, labels_T: Tensor | None = None) -> Tensor:
        if labels_T is None:
            return F.linear(x, self.weight)
        return cross_entropy_sum(x, self.weight, labels_T, self.log_probs)


class OlmoeForCausalLM(OlmoePreTrainedModel):
    """OlmoeModel with its language-modelling head, as documented for transformers.OlmoeForCausalLM."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.model = OlmoeModel(config, init=False)
        self.lm_head = OlmoeHead(config)
        self.tie_weights()
        _init_unless_meta(self, config.initializer_range)

    def tie_weights(self) -> None:
        """Make the head share the embedding's parameter where the config says so (again after to_empty)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_experts_backend(self, backend: str) -> None:
        """How experts multiply: auto, loop, grouped_mm or sonicmoe (choices.ExpertsBackend)."""
        for module in self.modules():
            if isinstance(module, OlmoeExperts):
                module.backend = backend

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache_position: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """labels [B, S]: shifted inside, -100 ignored; `loss` is Transformers' own (pooled aux loss, mean
        over targets). logits_to_keep: the last so many positions (0: all), or a tensor of positions."""
        output_router_logits = _given(output_router_logits, self.config.output_router_logits)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_router_logits,
            output_hidden_states,
            output_attentions,
            cache_position,
            return_dict=True,
        )
        # -0 is 0: all positions.
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])

        loss = aux_loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
            )
        if output_router_logits:
            config = self.config
            aux_loss = load_balancing_loss(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask, "hf"
            )
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss
        output = MoeCausalLMOutputWithPast(
            loss,
            aux_loss,
            logits,
            outputs.past_key_values,
            outputs.hidden_states,
            outputs.attentions,
            outputs.router_logits,
        )
        return output if _given(return_dict, self.config.return_dict) else output.to_tuple()

    def training_forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_offsets: Tensor | None = None,
    ) -> TrainingOutput:
        """The trainer's forward: input_ids and labels [B, S] int64 (labels shifted inside, -100 ignored).

        labels None: route the tokens and leave the head out; ce_sum is then 0. document_offsets: see
        OlmoeModel.run_layers.
        """
        hidden_states, _, router_logits, expert_indices = self.model.run_layers(
            input_ids, attention_mask, position_ids, document_offsets=document_offsets
        )
        ce_sum = hidden_states[-1].new_zeros((), dtype=torch.float32)
        if labels is not None:
            labels_BS = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            ce_sum = self.lm_head(hidden_states[-1].flatten(0, 1), labels_BS.flatten())
        return TrainingOutput(ce_sum, router_logits, expert_indices)

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Continue `input_ids` [B, S]; options as olmoe_train.model.generation.generate."""
        return generate(self, input_ids, **options)


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _init_unless_meta(module: nn.Module, std: float) -> None:
    """Random weights whose seed follows torch.manual_seed. A meta model gets its own when it is
    materialised."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        init_weights(module, int(torch.randint(2**62, ())), std)

"""The OLMoE decoder, with Transformers' module and parameter names (arXiv 2409.02060; model type `olmoe`).

Shapes: B batch, S sequence, T tokens (B x S), D hidden, E experts, K top-k, V vocabulary, L layers,
C cached + new positions.

The model does not depend on ranks. distributed/parallelize.py applies sharding, activation checkpointing and
torch.compile to the modules from outside.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.adapters.spec import AdapterSpec, BaseIdentity
from olmoe_train.model.attention import (
    attention_mask,
    document_mask,
    documents_and_positions,
    has_document_kernel,
)
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.cross_entropy import IGNORE_INDEX, shift_labels
from olmoe_train.model.decoder_layer import OlmoeDecoderLayer
from olmoe_train.model.decoding import generate_batch
from olmoe_train.model.generation import generate, refuse_expert_choice
from olmoe_train.model.head import OlmoeHead
from olmoe_train.model.hf.pretrained import OlmoePreTrainedModel
from olmoe_train.model.initialization import init_unless_meta
from olmoe_train.model.kv_cache import KVCache, one_cache
from olmoe_train.model.losses import load_balancing_loss
from olmoe_train.model.moe.balancing import Balancer
from olmoe_train.model.moe.experts import OlmoeExperts
from olmoe_train.model.moe.router_stats import stack_layers
from olmoe_train.model.norm import build_norm
from olmoe_train.model.outputs import (
    DecoderOutput,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    TrainingOutput,
)
from olmoe_train.model.rope import rotary_cos_sin


class OlmoeModel(OlmoePreTrainedModel):
    """Embedding, L decoder layers and final norm, with the arguments and outputs of transformers.OlmoeModel.

    Args:
        config: Sizes and options of the model.
        init: Whether to fill the parameters with initial weights; meta parameters are never filled.
    """

    def __init__(self, config: OlmoeConfig, init: bool = True) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            config.pad_token_id,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleList(OlmoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size)
        if init:
            init_unless_meta(self, config.initializer_range, config.initialization)

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
        cache: KVCache | None = None,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """Run the decoder without the head.

        For every option that is None, the value in the configuration applies.

        Args:
            input_ids: [B, S] int64; give either `input_ids` or `inputs_embeds`.
            attention_mask: [B, C], 0 at padding; the cached positions come first.
            position_ids: [B, S] or [1, S] int64; by default S consecutive positions after the cached ones.
            past_key_values: Keys and values of earlier positions; the call appends the new ones.
            inputs_embeds: [B, S, D].
            use_cache: Whether to return a cache; the call creates one if `past_key_values` is None.
            output_router_logits: Whether to return the router logits.
            output_hidden_states: Whether to return the hidden states of all layers.
            output_attentions: Whether to return the attention probabilities.
            cache_position: [S] int64, positions of the new tokens; used if `position_ids` is None.
            return_dict: False returns a tuple of the fields that are not None.
            cache: The name of `past_key_values` since Transformers 5.24.

        Returns:
            The output; `last_hidden_state` has shape [B, S, D].

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds` is given, or both names of the
                cache.
        """
        config = self.config
        use_cache = _given(use_cache, config.use_cache)
        cache = one_cache(past_key_values, cache)
        cache = KVCache() if use_cache and cache is None else cache
        decoded = self.run_layers(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            cache_position,
            output_hidden_states=_given(output_hidden_states, config.output_hidden_states),
            output_attentions=_given(output_attentions, config.output_attentions),
            output_router_logits=_given(output_router_logits, config.output_router_logits),
        )
        output = MoeModelOutputWithPast(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=cache if use_cache else None,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            router_logits=decoded.router_logits,
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
        document_offsets: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_router_logits: bool = False,
        output_router_stats: bool = False,
    ) -> DecoderOutput:
        """Run the decoder without the head. Arguments that are not listed here are those of `forward`.

        Args:
            padding_mask: [B, C], 0 at padding. Attention ignores the mask if `document_offsets` is given; the
                routers' sums leave padding out in any case. Or bool [B, 1, S, C], true where a position may
                attend to another one, in place of causal attention; then there is no padding.
            document_offsets: int32 [documents + 1], the start of each document in the B x S tokens of the
                flattened batch, and the end of the last document. Attention does not cross a document
                boundary, and positions restart at 0 in every document; `position_ids` is ignored. Padding
                counts as a document.
            output_router_stats: Whether to return the routers' sums over tokens; only without a cache.

        Returns:
            What was requested; None for the rest.

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds` is given.
            UserError: With expert choice, `cache` has earlier positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary, mask_B1SC, document_offsets = self._positions(
            x_BSD, padding_mask, position_ids, cache, cache_position, document_offsets
        )
        token_mask_T, needed = None, output_router_stats or self.config.routing == "expert_choice"
        if needed and padding_mask is not None and padding_mask.dim() == 2:
            token_mask_T = padding_mask.reshape(-1).to(torch.float32)
        hidden_states, attentions, router_logits, router_stats = [], [], [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x_BSD)
            x_BSD, stats, logits_TE, probs = layer(
                x_BSD,
                rotary,
                mask_B1SC,
                cache,
                output_attentions,
                document_offsets,
                token_mask_T,
                output_router_stats,
                output_router_logits,
            )
            attentions.append(probs)
            router_logits.append(logits_TE)
            router_stats.append(stats)
        x_BSD = self.norm(x_BSD)
        return DecoderOutput(
            last_hidden_state=x_BSD,
            hidden_states=(*hidden_states, x_BSD) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
            router_stats=stack_layers(router_stats) if output_router_stats else None,
        )

    def _positions(
        self,
        x_BSD: Tensor,
        padding_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        cache_position: Tensor | None,
        document_offsets: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
        """Return what every layer's attention needs: (rotary, mask_B1SC, document offsets for the kernel).

        Attention accepts a mask or offsets, so at least one of the two is None.
        """
        cached, new = cache.get_seq_length() if cache is not None else 0, x_BSD.shape[1]
        if cached:
            refuse_expert_choice(self.config)
        if position_ids is None:
            arange = torch.arange(cached, cached + new, device=x_BSD.device)
            position_ids = (cache_position if cache_position is not None else arange).unsqueeze(0)
        if document_offsets is None:
            mask_B1SC = attention_mask(padding_mask, new, cached + new, x_BSD.device)
        else:
            documents_BS, position_ids = documents_and_positions(document_offsets, *x_BSD.shape[:2])
            # The mask works on every device, but attention then computes all S x S pairs.
            by_kernel = has_document_kernel(x_BSD, self.config.attention_dropout)
            mask_B1SC = None if by_kernel else document_mask(documents_BS)
            document_offsets = document_offsets if by_kernel else None
        return rotary_cos_sin(self.config, position_ids, x_BSD.dtype), mask_B1SC, document_offsets


class OlmoeForCausalLM(OlmoePreTrainedModel):
    """OlmoeModel with a language-modeling head, as documented for transformers.OlmoeForCausalLM."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.model = OlmoeModel(config, init=False)
        self.lm_head = OlmoeHead(config)
        self.balancer: Balancer | None = None
        self.adapter: AdapterSpec | None = None
        self.base: BaseIdentity | None = None
        self.tie_weights()
        init_unless_meta(self, config.initializer_range, config.initialization)

    def tie_weights(self) -> None:
        """Share the embedding's parameter with the head if config.tie_word_embeddings is set.

        Call again after `to_empty`, which separates the two parameters.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def decoder_layers(self) -> list[OlmoeDecoderLayer]:
        """The layers in their order."""
        return cast(list[OlmoeDecoderLayer], list(self.model.layers))

    def set_balancer(self, balancer: Balancer) -> None:
        """Set how the load of the experts is kept even. Only training uses the balancer's loss.

        Args:
            balancer: See model/moe/balancing.py. The buffers of a balancer that is a module become part of
                the model's state.
        """
        self.balancer = balancer
        for index, layer in enumerate(self.decoder_layers):
            layer.mlp.gate.scores = partial(balancer.scores, index)
            layer.mlp.per_sequence = balancer.per_sequence

    def set_experts_backend(self, backend: str) -> None:
        """Set the implementation of the experts' matrix products.

        Args:
            backend: auto, loop, grouped_mm or sonicmoe (config.choices.ExpertsBackend).
        """
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
        cache: KVCache | None = None,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Run the decoder and the head; with labels, also compute the loss as Transformers does.

        The loss is the mean over targets, plus the pooled load-balancing loss if the router logits are
        returned. Arguments that are not listed here, and options that are None, are as in OlmoeModel.forward.

        Args:
            labels: [B, S] int64, -100 at positions without a target; shifted by this method.
            output_router_logits: Whether to return the router logits and the load-balancing loss.
            logits_to_keep: Number of last positions to compute logits for (0: all), or a tensor of positions.

        Returns:
            The output; `logits` has shape [B, S, V] for logits_to_keep=0.

        Raises:
            ValueError: As OlmoeModel.forward.
        """
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
            cache=cache,
        )
        # With logits_to_keep=0 the slice is slice(0, None), which keeps all positions.
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])

        aux_loss = None
        if output_router_logits and self.config.routing == "token_choice":
            sizes = self.config.num_experts, self.config.num_experts_per_tok
            aux_loss = load_balancing_loss(outputs.router_logits, *sizes, attention_mask, "hf")
        loss = None if labels is None else self._mean_loss(logits, labels, aux_loss)
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

    def _mean_loss(self, logits: Tensor, labels: Tensor, aux_loss: Tensor | None) -> Tensor:
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        return loss if aux_loss is None else loss + self.config.router_aux_loss_coef * aux_loss

    def training_forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_offsets: Tensor | None = None,
        targets: Tensor | None = None,
        target_positions: Tensor | None = None,
    ) -> TrainingOutput:
        """Forward pass for training: summed cross-entropy and the routers' sums, without logits.

        Args:
            input_ids: [B, S] int64.
            labels: [B, S] int64 as in `forward`: the token at the same position, shifted by this method.
            attention_mask: [B, S], 0 at padding; or bool [B, 1, S, S], see OlmoeModel.run_layers.
            position_ids: [B, S] or [1, S] int64.
            document_offsets: See OlmoeModel.run_layers.
            targets: [B, S] int64, the token to predict at each position, -100 where there is none; give
                `targets` or `labels`. Without either the head is skipped, and ce_sum is 0.
            target_positions: [P] int64, positions in the B x S tokens of the flattened batch. With them,
                `targets` is [P] int64, and the log-probability of each target is returned.

        Returns:
            Summed cross-entropy or the targets' log-probabilities, and the routers' sums.
        """
        assert labels is None or targets is None, "labels and targets are two forms of one column"
        if labels is not None:
            targets = shift_labels(labels)
        decoded = self.model.run_layers(
            input_ids,
            attention_mask,
            position_ids,
            document_offsets=document_offsets,
            output_router_stats=True,
        )
        assert decoded.router_stats is not None
        hidden_TD = decoded.last_hidden_state.flatten(0, 1)
        ce_sum = hidden_TD.new_zeros((), dtype=torch.float32)
        if target_positions is not None:
            log_probs_P = self.lm_head(hidden_TD.index_select(0, target_positions), targets_P=targets)
            return TrainingOutput(ce_sum, decoded.router_stats, log_probs_P)
        if targets is not None:
            ce_sum = self.lm_head(hidden_TD, targets.flatten())
        return TrainingOutput(ce_sum, decoded.router_stats)

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Generate tokens after `input_ids` [B, S]; for the options and the result see
        olmoe_train.model.generation.generate."""
        return generate(self, input_ids, **options)

    def generate_batch(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Continue prompts of any lengths with continuous batching; for the options and the result see
        olmoe_train.model.decoding.generate_batch."""
        return generate_batch(self, prompts, self.lm_head.weight.device, **options)


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value

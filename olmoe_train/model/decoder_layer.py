"""One layer of the decoder.

Shapes: B batch, S sequence, T tokens (B x S), E experts, C cached + new positions.
"""

from torch import Tensor, nn

from olmoe_train.model.attention import OlmoeAttention
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.kv_cache import KVCache
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.model.moe.expert_choice import ExpertChoiceBlock
from olmoe_train.model.moe.router_stats import RouterStats
from olmoe_train.model.norm import build_norm


class OlmoeDecoderLayer(nn.Module):
    """Attention and mixture-of-experts block, each behind a norm and with a residual connection."""

    def __init__(self, config: OlmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attn = OlmoeAttention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        block = ExpertChoiceBlock if config.routing == "expert_choice" else OlmoeSparseMoeBlock
        self.mlp = block(config)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1SC: Tensor | None = None,
        cache: KVCache | None = None,
        output_attentions: bool = False,
        document_offsets: Tensor | None = None,
        token_mask_T: Tensor | None = None,
        output_router_stats: bool = False,
        output_router_logits: bool = False,
    ) -> tuple[Tensor, RouterStats | None, Tensor | None, Tensor | None]:
        """Run the layer.

        Args:
            x_BSD: Input of the layer.
            rotary: Cosines and sines of the positions (model/rope.py).
            mask_B1SC: bool, true where position s may attend to position c; None: causal attention.
            cache: Keys and values of earlier positions; the layer appends its own.
            output_attentions: Whether to return the attention probabilities.
            document_offsets: See OlmoeModel.run_layers; only for the document kernel.
            token_mask_T: fp32, 0 at padding; see OlmoeSparseMoeBlock.forward.
            output_router_stats: Whether to return the router's sums.
            output_router_logits: Whether to return the router logits.

        Returns:
            (x_BSD, the router's sums, router logits_TE fp32, attention probabilities [B, heads, S, C]). The
            last three are None unless requested.
        """
        attended_BSD, probs = self.self_attn(
            self.input_layernorm(x_BSD), rotary, mask_B1SC, cache, output_attentions, document_offsets
        )
        x_BSD = x_BSD + attended_BSD
        expert_BSD, stats, logits_TE = self.mlp(
            self.post_attention_layernorm(x_BSD), token_mask_T, output_router_stats, output_router_logits
        )
        return x_BSD + expert_BSD, stats, logits_TE, probs

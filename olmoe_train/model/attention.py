"""Causal self-attention as OLMoE has it: RMS-normalised queries and keys, rotary positions, grouped-query
heads.

Shapes: B batch, S new positions, C cached + new positions, T tokens (B x S), D hidden, N query heads, M
key/value heads, H head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.kv_cache import KVCache
from olmoe_train.model.norm import OlmoeRMSNorm
from olmoe_train.model.rope import apply_rotary


class OlmoeAttention(nn.Module):
    def __init__(self, config: OlmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.clip_qkv = config.clip_qkv
        self.dropout = config.attention_dropout
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, query_size, bias=bias)
        self.k_proj = nn.Linear(hidden, key_value_size, bias=bias)
        self.v_proj = nn.Linear(hidden, key_value_size, bias=bias)
        self.o_proj = nn.Linear(query_size, hidden, bias=bias)
        # Over the whole projected width, before the split into heads.
        self.q_norm = OlmoeRMSNorm(query_size, config.rms_norm_eps)
        self.k_norm = OlmoeRMSNorm(key_value_size, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1SC: Tensor | None,
        cache: KVCache | None = None,
        output_attentions: bool = False,
        document_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [B, S, D], attention probabilities [B, N, S, C] if asked for).

        rotary: cos and sin. mask_B1SC: True where a query may look; None means causal over the new positions.
        document_offsets: where documents start in the T tokens, for attention within each; int32.
        """
        q, k, v = self.q_norm(self.q_proj(x_BSD)), self.k_norm(self.k_proj(x_BSD)), self.v_proj(x_BSD)
        if self.clip_qkv is not None:
            q, k, v = (t.clamp(-self.clip_qkv, self.clip_qkv) for t in (q, k, v))
        q_BNSH, k_BMSH, v_BMSH = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        q_BNSH, k_BMSH = apply_rotary(q_BNSH, k_BMSH, *rotary)
        if cache is not None:
            k_BMSH, v_BMSH = cache.update(k_BMSH, v_BMSH, self.layer_idx)

        dropout = self.dropout if self.training else 0.0
        probs = None
        if output_attentions:
            out_BNSH, probs = _explicit_attention(q_BNSH, k_BMSH, v_BMSH, mask_B1SC, dropout)
        elif document_offsets is not None:
            out_BNSH = _document_attention(q_BNSH, k_BMSH, v_BMSH, document_offsets)
        else:
            # One new position attends to everything cached; is_causal would align it with the first key.
            causal = mask_B1SC is None and q_BNSH.shape[2] > 1
            grouped = q_BNSH.shape[1] != k_BMSH.shape[1]
            out_BNSH = F.scaled_dot_product_attention(
                q_BNSH, k_BMSH, v_BMSH, mask_B1SC, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
            )
        return self.o_proj(out_BNSH.transpose(1, 2).flatten(2)), probs


def _explicit_attention(
    q_BNSH: Tensor, k_BMCH: Tensor, v_BMCH: Tensor, mask_B1SC: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The same attention with its probabilities in memory, softmax in fp32."""
    groups = q_BNSH.shape[1] // k_BMCH.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k_BMCH, v_BMCH))
    scores_BNSC = q_BNSH @ k.transpose(2, 3) * q_BNSH.shape[-1] ** -0.5
    if mask_B1SC is None:
        mask_B1SC = torch.ones(scores_BNSC.shape[-2:], dtype=torch.bool, device=k.device).tril(
            scores_BNSC.shape[-1] - scores_BNSC.shape[-2]
        )
    scores_BNSC = scores_BNSC.masked_fill(~mask_B1SC, torch.finfo(scores_BNSC.dtype).min)
    probs_BNSC = scores_BNSC.softmax(-1, dtype=torch.float32).to(q_BNSH.dtype)
    return F.dropout(probs_BNSC, dropout) @ v, probs_BNSC


def has_document_kernel(x: Tensor, dropout: float) -> bool:
    """Whether `_document_attention` takes x's device and dtype: flash attention, of half precision on GPUs.

    The host decides, from what it knows: nothing here waits for the GPU.
    """
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dropout == 0


def _document_attention(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, offsets: Tensor) -> Tensor:
    """Causal attention within each document of the batch laid end to end; work and memory follow the
    documents' lengths. [B, N, S, H]."""
    groups = q_BNSH.shape[1] // k_BMSH.shape[1]
    if groups > 1:
        k_BMSH, v_BMSH = (t.repeat_interleave(groups, dim=1) for t in (k_BMSH, v_BMSH))
    q_TNH, k_TNH, v_TNH = (t.transpose(1, 2).flatten(0, 1) for t in (q_BNSH, k_BMSH, v_BMSH))
    longest = q_BNSH.shape[2]  # the true one would have to be read from the GPU
    out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, offsets, offsets, longest, longest, window_size=(-1, 0))
    assert isinstance(out_TNH, Tensor)  # more is returned only on request
    return out_TNH.unflatten(0, (-1, longest)).transpose(1, 2)


def documents_and_positions(offsets: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """(number of its document, place in it) of each token, both int64 [B, S]; no host sync.

    offsets: int32 [documents + 1] into the B * S tokens laid end to end.
    """
    tokens_T = torch.arange(batch * length, dtype=offsets.dtype, device=offsets.device)
    documents_T = torch.searchsorted(offsets, tokens_T, right=True) - 1
    positions_T = tokens_T - offsets[documents_T]
    return documents_T.view(batch, length), positions_T.long().view(batch, length)


def document_mask(documents_BS: Tensor) -> Tensor:
    """Boolean [B, 1, S, S], True where a query may look: at its own document, up to itself."""
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS.tril()[:, None]


def attention_mask(
    padding_mask_BC: Tensor | None, new: int, total: int, device: torch.device
) -> Tensor | None:
    """Boolean [B, 1, S, C], True where query s may look at key c; None where plain causal attention does the
    same.

    padding_mask_BC: 1 at tokens, 0 at padding, over cached and new positions (ValueError if its width is not
    `total`).
    """
    if padding_mask_BC is None and (new == total or new == 1):
        return None
    if padding_mask_BC is not None and padding_mask_BC.shape[-1] != total:
        raise ValueError(
            f"attention_mask covers {padding_mask_BC.shape[-1]} positions, cached and new tokens are {total}"
        )
    if padding_mask_BC is not None and new == 1:  # decoding: everything cached lies behind it
        return padding_mask_BC.bool()[:, None, None, :]
    causal_SC = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    if padding_mask_BC is None:
        return causal_SC[None, None]
    # A padding query in front of every token may look at nothing: scaled_dot_product_attention then gives 0,
    # not NaN.
    return causal_SC & padding_mask_BC.bool()[:, None, None, :]

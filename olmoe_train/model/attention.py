"""Causal self-attention of OLMoE (arXiv 2409.02060; Transformers' `models/olmoe/modeling_olmoe.py`).

The order is: project, RMSNorm of queries and keys (q_norm, k_norm; none with qk_norm=false), clip (clip_qkv),
split into heads, rotate (RoPE), attend, project. Grouped-query attention is supported: several query heads
may share a key/value head.

Shapes: B batch, S new positions, C cached and new positions, T tokens (B S), D hidden size, N query heads,
M key/value heads, H head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.kv_cache import KVCache
from olmoe_train.model.norm import build_norm
from olmoe_train.model.rope import apply_rotary


class OlmoeAttention(nn.Module):
    """The self-attention of one decoder layer.

    Args:
        config: Architecture of the model.
        layer_idx: Index of the layer, by which the key/value cache is addressed.
    """

    def __init__(self, config: OlmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.clip_qkv = config.clip_qkv
        self.dropout = config.attention_dropout
        query_width, key_value_width = config.query_width, config.key_value_width
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, query_width, bias=bias)
        self.k_proj = nn.Linear(hidden, key_value_width, bias=bias)
        self.v_proj = nn.Linear(hidden, key_value_width, bias=bias)
        self.o_proj = nn.Linear(query_width, hidden, bias=bias)
        # Over the whole projected width, before the split into heads.
        self.q_norm = build_norm(config, query_width) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, key_value_width) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1SC: Tensor | None,
        cache: KVCache | None = None,
        output_attentions: bool = False,
        document_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from the new positions to the cached and the new ones.

        Args:
            x_BSD: Input, [B, S, D].
            rotary: Cosines and sines of the new positions, each [B or 1, S, H] in x's dtype.
            mask_B1SC: Boolean, True where query s may attend to key c. None: causal over the new positions;
                a single new position attends to everything.
            cache: Key/value cache, to which the new positions are appended. None: no cache.
            output_attentions: Return the attention probabilities; they are then all in memory.
            document_offsets: int32 [documents + 1], the token at which each document starts in the T tokens
                of the batch laid end to end. Attention stays within a document. Needs
                `has_document_kernel`, and no mask and no cache.

        Returns:
            Output [B, S, D]; attention probabilities [B, N, S, C], or None if they were not asked for.
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
            # A single new position attends to all cached ones. is_causal would align it with the first key.
            causal = mask_B1SC is None and q_BNSH.shape[2] > 1
            grouped = q_BNSH.shape[1] != k_BMSH.shape[1]
            out_BNSH = F.scaled_dot_product_attention(
                q_BNSH, k_BMSH, v_BMSH, mask_B1SC, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
            )
        return self.o_proj(out_BNSH.transpose(1, 2).flatten(2)), probs


def _explicit_attention(
    q_BNSH: Tensor, k_BMCH: Tensor, v_BMCH: Tensor, mask_B1SC: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The same attention with its probabilities in memory; the softmax is computed in fp32.

    Returns:
        Values before the output projection, [B, N, S, H]; probabilities, [B, N, S, C].
    """
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
    """Whether `_document_attention` supports this input: its kernel is flash attention, which needs a GPU and
    bf16 or fp16, and is used here without dropout.

    Args:
        x: Input of the attention; only its device and dtype are read, so the host does not wait for the GPU.
        dropout: Dropout probability of the attention.
    """
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dropout == 0


def _document_attention(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, offsets: Tensor) -> Tensor:
    """Causal attention within each document of the batch laid end to end.

    Time is proportional to the sum of the squared document lengths, and memory to the number of tokens.

    Args:
        offsets: int32 [documents + 1], the token at which each document starts in the T tokens.

    Returns:
        Values before the output projection, [B, N, S, H].
    """
    # Imported here: it imports TorchDynamo, which takes a second, and only GPUs come here.
    from torch.nn.attention.varlen import varlen_attn

    groups = q_BNSH.shape[1] // k_BMSH.shape[1]
    if groups > 1:
        k_BMSH, v_BMSH = (t.repeat_interleave(groups, dim=1) for t in (k_BMSH, v_BMSH))
    q_TNH, k_TNH, v_TNH = (t.transpose(1, 2).flatten(0, 1) for t in (q_BNSH, k_BMSH, v_BMSH))
    # An upper bound of the longest document: reading its true length from the GPU would make the host wait.
    longest = q_BNSH.shape[2]
    out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, offsets, offsets, longest, longest, window_size=(-1, 0))
    assert isinstance(out_TNH, Tensor)  # a tuple is returned only if auxiliary outputs are requested
    return out_TNH.unflatten(0, (-1, longest)).transpose(1, 2)


def documents_and_positions(offsets: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The document of each token, and the token's position in it; the host does not wait for the GPU.

    Args:
        offsets: int32 [documents + 1], the token at which each document starts in the B * S tokens laid end
            to end.
        batch: B.
        length: S.

    Returns:
        Index of the document, and position within the document, both int64 [B, S].
    """
    tokens_T = torch.arange(batch * length, dtype=offsets.dtype, device=offsets.device)
    documents_T = torch.searchsorted(offsets, tokens_T, right=True) - 1
    positions_T = tokens_T - offsets[documents_T]
    return documents_T.view(batch, length), positions_T.long().view(batch, length)


def document_mask(documents_BS: Tensor) -> Tensor:
    """The attention mask for attention within documents.

    Args:
        documents_BS: Index of each token's document, [B, S].

    Returns:
        Boolean [B, 1, S, S], True where the key is in the query's document and not after the query.
    """
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS.tril()[:, None]


def attention_mask(
    padding_mask_BC: Tensor | None, new: int, total: int, device: torch.device
) -> Tensor | None:
    """The attention mask for causal attention that ignores padding.

    Args:
        padding_mask_BC: 1 at tokens and 0 at padding, over cached and new positions. None: no padding. A mask
            [B, 1, S, C] is returned as it is.
        new: S.
        total: C.
        device: Device of the mask.

    Returns:
        Boolean [B or 1, 1, S, C], True where query s may attend to key c. None: plain causal attention does
        the same.

    Raises:
        ValueError: `padding_mask_BC` does not have `total` columns.
    """
    if padding_mask_BC is None and (new == total or new == 1):
        return None
    if padding_mask_BC is not None and padding_mask_BC.dim() == 4:
        return padding_mask_BC
    if padding_mask_BC is not None and padding_mask_BC.shape[-1] != total:
        raise ValueError(
            f"attention_mask has {padding_mask_BC.shape[-1]} positions, but there are {total} cached and new "
            "tokens; give one value for each of them"
        )
    if padding_mask_BC is not None and new == 1:  # decoding: all cached positions come before the new one
        return padding_mask_BC.bool()[:, None, None, :]
    causal_SC = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    if padding_mask_BC is None:
        return causal_SC[None, None]
    # A padding query before the first token may attend to nothing. scaled_dot_product_attention returns 0 for
    # such a row, and not NaN.
    return causal_SC & padding_mask_BC.bool()[:, None, None, :]

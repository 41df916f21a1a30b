"""Keys and values of the tokens seen so far, so that decoding computes only the new ones.

Shapes: B batch, N key/value heads, S sequence, H head_dim.
"""

import torch
from torch import Tensor


class KVCache:
    """One growing key and value tensor [B, N, S, H] a layer; `past_key_values` of the model's forward.

    The first `update` of a layer keeps the tensors it is given; later ones write into a buffer with room to
    spare, so that a token costs its own copy and not one of the whole past. Under autograd they concatenate.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._length: list[int] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append [B, N, S_new, H] to layer `layer_idx` (layers come in order); all its keys and values."""
        if layer_idx == len(self._length):
            self._keys.append(key)
            self._values.append(value)
            self._length.append(key.shape[2])
            return key, value
        seen = self._length[layer_idx]
        total = seen + key.shape[2]
        self._keys[layer_idx] = _append(self._keys[layer_idx], seen, key)
        self._values[layer_idx] = _append(self._values[layer_idx], seen, value)
        self._length[layer_idx] = total
        return self._keys[layer_idx][:, :, :total], self._values[layer_idx][:, :, :total]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included; 0 while empty."""
        return self._length[layer_idx] if layer_idx < len(self._length) else 0

    def __len__(self) -> int:
        return len(self._length)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [B, N, S, H]."""
        length = self._length[layer_idx]
        return self._keys[layer_idx][:, :, :length], self._values[layer_idx][:, :, :length]


def _append(buffer: Tensor, used: int, new: Tensor) -> Tensor:
    """A buffer with `buffer`'s first `used` positions, then `new`; `buffer` itself where it has the room."""
    if new.requires_grad or buffer.requires_grad:
        return torch.cat((buffer[:, :, :used], new), dim=2)
    total = used + new.shape[2]
    if total > buffer.shape[2]:
        batch, heads, _, width = buffer.shape
        longer = buffer.new_empty(batch, heads, 2 * total, width)
        longer[:, :, :used] = buffer[:, :, :used]
        buffer = longer
    buffer[:, :, used:total] = new
    return buffer

"""The key/value cache: keys and values of the tokens seen so far, so that decoding computes only new ones.

Shapes: B batch, M key/value heads, S new positions, C cached and new positions, H head width.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values [B, M, C, H] per layer; the `past_key_values` of the model's forward.

    The first `update` of a layer keeps the tensors it is given. Later updates write into a buffer that is
    longer than needed, so that adding a token copies that token, and not the whole past. If a tensor requires
    gradients, updates concatenate instead, because writing into a buffer would break autograd.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._length: list[int] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values to one layer.

        Args:
            key: Keys of the new positions, [B, M, S, H].
            value: Values of the new positions, [B, M, S, H].
            layer_idx: The layer. The first updates must come in the order of the layers.

        Returns:
            All keys and all values of the layer, each [B, M, C, H].
        """
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

    def crop(self, length: int) -> None:
        """Forget all positions after the first `length`; as `crop` of Transformers' caches."""
        # Cut buffers have no room, so the next update copies: tensors that others hold are not written to.
        self._keys = [key[:, :, :length] for key in self._keys]
        self._values = [value[:, :, :length] for value in self._values]
        self._length = [min(length, known) for known in self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions in the cache, padding included. 0: the cache is empty."""
        return self._length[layer_idx] if layer_idx < len(self._length) else 0

    def __len__(self) -> int:
        """Number of layers in the cache."""
        return len(self._length)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [B, M, C, H]."""
        length = self._length[layer_idx]
        return self._keys[layer_idx][:, :, :length], self._values[layer_idx][:, :, :length]


def _append(buffer: Tensor, used: int, new: Tensor) -> Tensor:
    """Append `new` after the first `used` positions of a buffer.

    Returns:
        The same buffer if `new` fits, else a new one of twice the length; [B, M, at least C, H].
    """
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


class RowCache:
    """Keys and values of rows of different lengths; the `past_key_values` of a step."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, [rows of the buffer, M, positions of the buffer, H]."""
        self._position_B = torch.empty(0)
        self._longest = 0

    def add(self, packed: KVCache, lengths: list[int], used: int, rows: int, positions: int) -> None:
        """Append prompts as rows.

        Args:
            packed: Keys and values of the prompts, laid end to end, [1, M, T, H] per layer.
            lengths: Tokens of each prompt.
            used: Number of rows before.
            rows: Rows that a new buffer has, if one is needed: at least those before and the new ones.
            positions: Positions that every row must have place for.
        """
        for layer in range(len(packed)):
            parts = packed[layer]
            if layer == len(self._buffers):
                self._buffers.append((parts[0].new_empty(0), parts[1].new_empty(0)))
            buffers = self._buffers[layer]
            if buffers[0].shape[0] < used + len(lengths) or buffers[0].shape[2] < positions:
                first, second = (
                    _resized(buffer, part, used, rows, positions)
                    for buffer, part in zip(buffers, parts, strict=True)
                )
                self._buffers[layer] = buffers = first, second
            for buffer, part in zip(buffers, parts, strict=True):
                for row, piece in enumerate(part[0].split(lengths, dim=1), start=used):
                    buffer[row, :, : piece.shape[1]] = piece

    def move(self, source: int, to: int, length: int) -> None:
        """Copy the first `length` positions of a row over those of another row."""
        for buffers in self._buffers:
            for buffer in buffers:
                buffer[to, :, :length] = buffer[source, :, :length]

    def at(self, position_B: Tensor, longest: int) -> "RowCache":
        """The cache, to which the next step appends one position per row.

        Args:
            position_B: int64, the position of each row's new token.
            longest: The largest of them, plus one.
        """
        self._position_B, self._longest = position_B, longest
        return self

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one new token per row, [B, M, 1, H]; see KVCache.update.

        Returns:
            Keys and values [B, M, C, H]. Positions after a row's new token hold any finite value.
        """
        batch = len(self._position_B)
        row_B = torch.arange(batch, device=key.device)
        buffers = self._buffers[layer_idx]
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[row_B, :, self._position_B] = new[:, :, 0]
        keys, values = (buffer[:batch, :, : self._longest] for buffer in buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Number of positions of the longest row before the step."""
        return self._longest - 1


def _resized(buffer: Tensor, like: Tensor, used: int, rows: int, positions: int) -> Tensor:
    # Zeros, because attention multiplies what its mask hides by 0, and 0 * NaN is NaN.
    resized = like.new_zeros(rows, like.shape[1], positions, like.shape[3])
    if used:
        kept = min(positions, buffer.shape[2])
        resized[:used, :, :kept] = buffer[:used, :, :kept]
    return resized


def one_cache(past_key_values: KVCache | None, cache: KVCache | None) -> KVCache | None:
    """The cache that either name of the argument gives."""
    if past_key_values is not None and cache is not None:
        raise ValueError("give past_key_values or cache, not both: they are two names of one argument")
    return past_key_values if cache is None else cache

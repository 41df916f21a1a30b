"""KVCache holds exactly the keys and values it was given, in order, with and without gradients."""

import torch
from torch import Tensor

from olmoe_train.model.kv_cache import KVCache

PIECES = [3, 1, 1, 4, 1, 20]


def pieces(requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, length, 4, requires_grad=requires_grad) for length in PIECES]


def test_update_returns_everything_so_far_in_every_layer() -> None:
    cache = KVCache()
    assert cache.get_seq_length() == 0
    assert len(cache) == 0
    keys = pieces()
    for count in range(1, len(PIECES) + 1):
        expected = torch.cat(keys[:count], dim=2)
        for layer in range(2):
            key, value = cache.update(keys[count - 1] + layer, -keys[count - 1], layer)
            assert torch.equal(key, torch.cat([piece + layer for piece in keys[:count]], dim=2))
            assert torch.equal(value, -expected)
        assert cache.get_seq_length() == sum(PIECES[:count])
        assert torch.equal(cache[1][1], -expected)
    assert len(cache) == 2


def test_update_leaves_the_tensors_it_was_given_alone() -> None:
    cache = KVCache()
    keys = pieces()
    copies = [key.clone() for key in keys]
    for key in keys:
        cache.update(key, key, 0)
    assert all(torch.equal(key, copy) for key, copy in zip(keys, copies, strict=True))


def test_cropped_positions_are_replaced_and_not_written_over() -> None:
    keys = pieces()
    for seen in range(1, len(PIECES)):
        cache = KVCache()
        for key in keys[:seen]:
            whole, _ = cache.update(key, -key, 0)
        copy = whole.clone()
        cache.crop(2)
        assert cache.get_seq_length() == 2
        key, value = cache.update(keys[seen], -keys[seen], 0)
        assert torch.equal(key, torch.cat([keys[0][:, :, :2], keys[seen]], dim=2))
        assert torch.equal(value, -key)
        assert torch.equal(whole, copy)
    cache.crop(99)
    assert cache.get_seq_length() == 2 + PIECES[-1]


def test_gradients_flow_through_cached_keys_and_values() -> None:
    cache = KVCache()
    keys = pieces(requires_grad=True)
    for key in keys:
        whole, _ = cache.update(key, 2 * key, 0)
    (whole * torch.arange(sum(PIECES))[:, None]).sum().backward()
    start = 0
    for key, length in zip(keys, PIECES, strict=True):
        expected = torch.arange(start, start + length)[:, None].expand(2, 3, length, 4)
        assert key.grad is not None
        assert torch.equal(key.grad, expected.float())
        start += length


def test_decoding_copies_a_token_and_not_the_past() -> None:
    cache = KVCache()
    for _ in range(3):
        key, _ = cache.update(torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4), 0)
    longer, _ = cache.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4), 0)
    assert longer.data_ptr() == key.data_ptr()

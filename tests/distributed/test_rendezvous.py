"""Ranks agree on a prefix of the store, whatever earlier ranks have left there."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from olmoe_train.distributed.rendezvous import common_prefix, launcher_warnings

RANKS = 3


def meet(store: Store) -> set[str]:
    """Return the prefixes of all ranks, each of which is a thread."""

    def prefix(rank: int) -> str:
        return common_prefix(store, rank, RANKS, timedelta(seconds=30), [""])

    with ThreadPoolExecutor(RANKS) as ranks:
        return set(ranks.map(prefix, reversed(range(RANKS))))


def test_every_attempt_has_one_prefix_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher that has not seen the restarts
    store = dist.HashStore()  # type: ignore[attr-defined]
    first, second = meet(store), meet(store)
    # Two ranks of a third attempt die: one before rank 0 answers, one before it has heard the answer.
    store.set("question/1", "asked by a rank that has died")
    store.set("question/2", store.get("question/2").decode())
    fourth = meet(store)
    assert [len(first), len(second), len(fourth)] == [1, 1, 1]
    assert len(first | second | fourth) == 3


def test_torchrun_that_cannot_restart_a_node_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GROUP_WORLD_SIZE", "2"), ("TORCHELASTIC_MAX_RESTARTS", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert launcher_warnings() == []
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node" in launcher_warnings()[0]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert launcher_warnings() == []

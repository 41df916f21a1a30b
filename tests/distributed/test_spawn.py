"""The harness: results in rank order, and no failure of a rank is lost or waited for."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, run_ranks


def sum_and_rank(offset: float) -> tuple[torch.Tensor, int]:
    total = torch.full((2,), offset)
    dist.all_reduce(total)
    return total, dist.get_rank()


def test_results_come_in_rank_order() -> None:
    results = run_ranks(3, sum_and_rank, 0.5)
    assert [rank for _, rank in results] == [0, 1, 2]
    assert all(total.tolist() == [1.5, 1.5] for total, _ in results)


def rank_1_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def rank_1_is_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def rank_1_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def test_a_rank_that_raises_is_quoted() -> None:
    with pytest.raises(RankError, match=r"rank 1: Traceback[^§]*KeyError: 'the reason'"):
        run_ranks(2, rank_1_raises)


def test_a_rank_that_is_killed_is_named() -> None:
    with pytest.raises(RankError, match="rank 1: died without a word, exit code -9"):
        run_ranks(2, rank_1_is_killed)


def test_a_rank_that_hangs_is_ended_and_its_place_is_shown() -> None:
    with pytest.raises(RankError, match=r"rank 1: died[^§]*in rank_1_hangs"):
        run_ranks(2, rank_1_hangs, timeout=3)

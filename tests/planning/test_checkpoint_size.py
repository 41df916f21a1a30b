"""Bytes and number of checkpoints on disk, by hand."""

from typing import Any

import pytest

from olmoe_train.config.choices import Precision
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.train import CheckpointConfig
from olmoe_train.planning.checkpoint_size import checkpoint_bytes, disk_plan, most_checkpoints
from tests.support.plans import OLMOE_1B_7B, TOTAL


def test_a_checkpoint_has_weights_and_moments_and_the_average() -> None:
    assert checkpoint_bytes(OLMOE_1B_7B, None, AdamWConfig(), averaged=False) == 12 * TOTAL
    assert checkpoint_bytes(OLMOE_1B_7B, None, AdamWConfig(), averaged=True) == 16 * TOTAL
    halved = AdamWConfig(moments_dtype=Precision.bf16)
    assert checkpoint_bytes(OLMOE_1B_7B, None, halved, averaged=False) == 8 * TOTAL


@pytest.mark.parametrize(
    ("keys", "last_step", "most"),
    [
        ({"every": 1000, "keep": 2}, 10_000, 3),  # the oldest of two goes after the third is there
        ({"every": 1000, "keep": 2}, 2000, 2),  # there are no more
        ({"every": 1000, "keep": 2}, None, 3),
        ({"every": 1000, "keep": 0}, 10_000, 10),
        ({"every": 300, "keep": 0}, 1000, 4),  # 300, 600, 900, and the end
        ({"every": 300, "keep": 0, "export_every": 500}, 1000, 5),  # 300, 500, 600, 900, 1000
        ({"every": 1000, "keep": 1, "keep_every": 5000}, 20_000, 2 + 4),
        ({"every": 0, "keep": 2}, 1000, 1),
    ],
)
def test_checkpoints_at_a_time(keys: dict[str, Any], last_step: int | None, most: int) -> None:
    assert most_checkpoints(CheckpointConfig(**keys), last_step) == most


def test_exports_stay() -> None:
    cfg = CheckpointConfig(every=1000, keep=1, export_every=4000)
    plan = disk_plan(cfg, OLMOE_1B_7B, None, AdamWConfig(), False, 10_000)
    assert (plan.checkpoints, plan.exports) == (2, 2)
    assert plan.total == 2 * 12 * TOTAL + 2 * 4 * TOTAL

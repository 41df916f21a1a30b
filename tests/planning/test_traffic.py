"""Traffic that `olmoe plan` predicts: bytes and seconds on each link, by hand."""

from dataclasses import replace

import pytest

from olmoe_train.config.choices import ActivationCheckpointing, Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.planning.report import plan_layout, plan_micro_batch, traffic_lines
from olmoe_train.planning.traffic import Links, RankGroup, exchange, rank_group, ring, step_traffic
from tests.support.plans import DENSE, EXPERTS, OLMOE_1B_7B, ONE_SEQUENCE, ROOT, TOTAL, fsdp, plan_config


def test_times_on_links_by_hand() -> None:
    links = Links(gpus_per_node=8, nvlink=400.0, network=50.0)
    # One node: 7/8 of 800 bytes at 400 bytes/s. Four: each takes in 600 bytes by 8 cards, 775 by NVLink.
    assert ring(800, RankGroup(8, 8), links).seconds == pytest.approx(1.75)
    assert ring(800, RankGroup(32, 8), links).seconds == pytest.approx(775 / 400)
    assert ring(800, RankGroup(32, 8), replace(links, network=10.0)).seconds == pytest.approx(600 / 80)
    assert ring(800, RankGroup(4, 1), links).seconds == pytest.approx(600 / 50)
    assert ring(800, RankGroup(1, 1), links).seconds == ring(800, RankGroup(1, 1), links).bytes_sent == 0
    assert exchange(800, RankGroup(8, 8), links).seconds == pytest.approx(700 / 400)
    assert exchange(800, RankGroup(16, 8), links).seconds == pytest.approx(400 / 50)
    assert rank_group(1, 64, links) == RankGroup(64, 8)
    assert rank_group(8, 8, links) == RankGroup(8, 1)
    assert rank_group(2, 2, links) == RankGroup(2, 2)


def test_traffic_of_a_step_by_hand() -> None:
    """On 64 ranks, a micro-batch of four sequences and 4 a step."""
    batch, links = replace(ONE_SEQUENCE, sequences=4), Links()
    sharded = step_traffic(OLMOE_1B_7B, fsdp(64), batch, 4, links)
    assert sharded.all_gather.bytes_sent == 4 * 2 * (ROOT + 2 * 16 * (DENSE + EXPERTS)) * 63 // 64
    assert sharded.reduce_scatter.bytes_sent == 4 * 4 * TOTAL * 63 // 64
    assert sharded.all_reduce.bytes_sent == sharded.all_to_all.bytes_sent == 0

    hybrid = step_traffic(OLMOE_1B_7B, fsdp(64, expert_parallel=8, copies=8), batch, 4, links)
    # 16,384 tokens x 8 choices x 2048 x 2 bytes, 7 of 8 to others, four times in each of 16 layers.
    assert hybrid.all_to_all.bytes_sent == 4 * 4 * 16 * 469_762_048
    assert hybrid.all_to_all.seconds == pytest.approx(4 * 4 * 16 * 469_762_048 / 450e9)
    assert hybrid.all_gather.bytes_sent == 4 * 2 * (ROOT + 2 * 16 * DENSE) * 7 // 8
    # An eighth of the model, summed over 8 copies on 8 nodes: 2 x 7/8 of it, once a step.
    assert hybrid.all_reduce.bytes_sent == 2 * 4 * (TOTAL // 8) * 7 // 8
    assert hybrid.all_reduce.seconds == pytest.approx(2 * 4 * (TOTAL // 8) * 7 / 8 / 50e9)

    whole = replace(batch, checkpointing=ActivationCheckpointing.full)
    recomputed = step_traffic(OLMOE_1B_7B, fsdp(8, 8), whole, 4, links)
    assert recomputed.all_to_all.bytes_sent == 4 * 6 * 16 * 469_762_048
    assert sharded.step_seconds(100.0) == 100.0
    assert hybrid.step_seconds(100.0) == 100.0 + hybrid.all_to_all.seconds
    assert sharded.step_seconds(0.0) == sharded.weights_seconds


def test_bytes_on_each_link_by_hand() -> None:
    """Nodes of 8; on a group's nodes its ranks share what comes from the others."""
    links = Links(gpus_per_node=8)
    on_four_nodes = ring(800, RankGroup(32, 8), links)
    # 31/32 of 800 bytes by NVLink; the 600 bytes of the other three nodes by 8 network cards.
    assert (on_four_nodes.node_bytes, on_four_nodes.network_bytes) == (775, 75)
    across = ring(800, RankGroup(4, 1), links)
    assert (across.node_bytes, across.network_bytes) == (0, across.bytes_sent) == (0, 600)
    # Of 16 ranks' rows 1/16 stay, 7/16 go to ranks on the node, 8/16 to the other one.
    rows = exchange(1600, RankGroup(16, 8), links)
    assert (rows.bytes_sent, rows.node_bytes, rows.network_bytes) == (1500, 700, 800)
    twice = (rows + rows).times(3)
    assert (twice.node_bytes, twice.network_bytes) == (6 * 700, 6 * 800)
    # 12 ranks do not fill nodes of 8: 4 a node, in three nodes.
    assert rank_group(1, 12, links) == RankGroup(12, 4)


def test_the_plan_prints_the_traffic_of_its_layout() -> None:
    """HSDP, 8 copies on 8 nodes, expert parallelism inside each; the numbers are those of
    test_traffic_of_a_step_by_hand."""
    cfg = plan_config(
        gpus=64, parallel=ParallelConfig(Strategy.fsdp, expert_parallel_size=8, replicate_size=8)
    )
    lines = traffic_lines(cfg)
    assert lines[0].startswith(
        "traffic of one GPU per step in GB: fsdp, 8 copies, expert parallel 8, 64 GPUs"
    )
    table = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in lines[4:8]}
    # All-gather, reduce-scatter and all-to-all stay in the node; the all-reduce is between nodes.
    gathered = 4 * 2 * (ROOT + 2 * 16 * DENSE) * 7 / 8 / 1e9
    rows = 4 * 4 * 16 * 469_762_048 / 1e9
    copies = 2 * 4 * (TOTAL // 8) * 7 / 8 / 1e9
    assert table["all-gather"][:3] == pytest.approx([gathered, gathered, 0], abs=0.005)
    assert table["all-to-all"][:3] == pytest.approx([rows, rows, 0], abs=0.005)
    assert table["all-reduce"][:3] == pytest.approx([copies, 0, copies], abs=0.005)
    planned = step_traffic(OLMOE_1B_7B, plan_layout(cfg), plan_micro_batch(cfg), 4, Links())
    for name, cells in table.items():
        kind = getattr(planned, name.replace("-", "_"))
        sizes = [size / 1e9 for size in (kind.bytes_sent, kind.node_bytes, kind.network_bytes)]
        assert cells == pytest.approx([*sizes, kind.seconds], abs=0.005), name
    assert any(f"{planned.all_to_all.seconds:.3g} s for the all-to-all" in line for line in lines)

    assert traffic_lines(plan_config(gpus=1)) == ["traffic between GPUs: none, with one GPU"]
    zero = plan_config(parallel=ParallelConfig(Strategy.deepspeed, zero_stage=2))
    assert traffic_lines(zero) == ["traffic between GPUs: not estimated for parallel.strategy=deepspeed"]

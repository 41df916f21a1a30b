"""One model under every layout: the real train(), six optimizer steps, the same losses, norms and weights.

The reference is one rank with one micro-batch. Each world size is spawned once and trains those of its
layouts that the selected tests need: `-k "zero-3"` trains the layouts with this name and their references.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.sharded import persistent_buffers
from olmoe_train.config.choices import Weights
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.train import train
from olmoe_train.training.build import build_model
from tests.support.data import PAD, write_prepared
from tests.support.faults import metrics, saved_weights
from tests.support.ranks import RankError, run_ranks
from tests.support.runs import (
    LENGTH,
    SEQUENCES,
    STEPS,
    TINY,
    Layout,
    compose,
    real_tokens,
    write_lines,
)
from tests.support.tiny import whole

LOSSES = ("train/loss", "train/ce_loss", "train/load_balancing_loss", "train/router_z_loss")


@dataclass(frozen=True)
class Case:
    name: str
    layout: Layout


def zero(ranks: int, stage: int, experts: int = 1, **changes: Any) -> Layout:
    """DeepSpeed: two micro-batches per step on two ranks, one on four."""
    return Layout(ranks, 4, "deepspeed", experts, zero_stage=stage, **changes)


CASES = [
    Case("1 rank", Layout(1, 16)),
    Case("1 rank, 2 micro-batches", Layout(1, 8)),
    Case("1 rank, 4 micro-batches", Layout(1, 4)),
    Case("1 rank, 16 micro-batches", Layout(1, 1)),
    Case("1 rank, padded", Layout(1, 16, padded=True)),
    Case("1 rank, 2 micro-batches, padded", Layout(1, 8, padded=True)),
    Case("1 rank, 4 micro-batches, padded", Layout(1, 4, padded=True)),
    Case("1 rank, bf16", Layout(1, 16, precision="bf16")),
    Case("1 rank, documents", Layout(1, 16, documents=True)),
    Case("ddp 2", Layout(2, 8, "ddp")),
    Case("fsdp 2", Layout(2, 8)),
    Case("fsdp 2, experts 2", Layout(2, 4, experts=2)),
    Case("ddp 2, experts 2", Layout(2, 8, "ddp", experts=2)),
    Case("zero-0 2, experts 1", zero(2, stage=0)),
    Case("zero-0 2, experts 2", zero(2, stage=0, experts=2)),
    Case("zero-1 2, experts 1", zero(2, stage=1)),
    Case("zero-1 2, experts 2", zero(2, stage=1, experts=2)),
    Case("zero-2 2, experts 1", zero(2, stage=2)),
    Case("zero-2 2, experts 2", zero(2, stage=2, experts=2)),
    Case("zero-3 2, experts 1", zero(2, stage=3)),
    Case("zero-3 2, experts 2", zero(2, stage=3, experts=2)),
    Case("fsdp 2, bf16", Layout(2, 8, precision="bf16")),
    Case("fsdp 2, prefetch 0", Layout(2, 8, prefetch=0)),
    Case("zero-1 2, experts 2, bf16", zero(2, stage=1, experts=2, precision="bf16")),
    Case("zero-2 2, experts 2, bf16", zero(2, stage=2, experts=2, precision="bf16")),
    Case("zero-3 2, experts 2, bf16", zero(2, stage=3, experts=2, precision="bf16")),
    Case("zero-3 2, experts 2, full", zero(2, stage=3, experts=2, checkpointing="full")),
    Case("zero-2 2, experts 2, selective", zero(2, stage=2, experts=2, checkpointing="selective")),
    Case("zero-3 2, experts 2, padded", zero(2, stage=3, experts=2, padded=True)),
    Case("zero-2 2, experts 2, optimizer offloaded", zero(2, stage=2, experts=2, offload="optimizer")),
    Case("zero-3 2, experts 2, parameters offloaded", zero(2, stage=3, experts=2, offload="parameters")),
    Case("zero-3 2, experts 2, documents", zero(2, stage=3, experts=2, documents=True)),
    Case("fsdp 4", Layout(4, 4)),
    Case("fsdp 4, experts 2", Layout(4, 4, experts=2)),
    Case("fsdp 4, experts 4", Layout(4, 4, experts=4)),
    Case("hsdp 2x2, experts 2", Layout(4, 2, experts=2, copies=2)),
    Case("ddp 4, experts 2", Layout(4, 2, "ddp", experts=2)),
    Case("zero-0 4, experts 1", zero(4, stage=0)),
    Case("zero-0 4, experts 2", zero(4, stage=0, experts=2)),
    Case("zero-1 4, experts 1", zero(4, stage=1)),
    Case("zero-1 4, experts 2", zero(4, stage=1, experts=2)),
    Case("zero-2 4, experts 1", zero(4, stage=2)),
    Case("zero-2 4, experts 2", zero(4, stage=2, experts=2)),
    Case("zero-3 4, experts 1", zero(4, stage=3)),
    Case("zero-3 4, experts 2", zero(4, stage=3, experts=2)),
    Case("fsdp 4, experts 2, full", Layout(4, 4, experts=2, checkpointing="full")),
    Case("fsdp 4, experts 4, full", Layout(4, 4, experts=4, checkpointing="full")),
    Case("hsdp 2x2, experts 2, full", Layout(4, 2, experts=2, copies=2, checkpointing="full")),
    Case("fsdp 4, experts 2, selective", Layout(4, 4, experts=2, checkpointing="selective")),
    Case("fsdp 4, experts 2, padded", Layout(4, 4, experts=2, padded=True)),
    Case("fsdp 4, experts 4, padded", Layout(4, 4, experts=4, padded=True)),
    Case("hsdp 2x2, experts 2, padded", Layout(4, 2, experts=2, copies=2, padded=True)),
    Case("fsdp 4, experts 2, bf16", Layout(4, 4, experts=2, precision="bf16")),
    Case("fsdp 4, experts 4, bf16", Layout(4, 4, experts=4, precision="bf16")),
    Case("hsdp 2x2, experts 2, bf16", Layout(4, 2, experts=2, copies=2, precision="bf16")),
    Case(
        "fsdp 4, experts 2, full, kept, prefetch 2",
        Layout(4, 4, experts=2, checkpointing="full", kept=True, prefetch=2),
    ),
    Case("zero-3 4, experts 4", zero(4, stage=3, experts=4)),
    Case("fsdp 4, experts 2, documents", Layout(4, 4, experts=2, documents=True)),
    Case("fsdp 4, experts 4, documents", Layout(4, 4, experts=4, documents=True)),
    Case("hsdp 2x2, experts 2, documents", Layout(4, 2, experts=2, copies=2, documents=True)),
    Case("fsdp 4, experts 2, documents, full", Layout(4, 4, experts=2, checkpointing="full", documents=True)),
    Case(
        "fsdp 4, experts 2, documents, selective",
        Layout(4, 4, experts=2, checkpointing="selective", documents=True),
    ),
    Case(
        "hsdp 2x2, experts 2, padded, full",
        Layout(4, 2, experts=2, copies=2, checkpointing="full", padded=True),
    ),
    Case("1 rank, lora", Layout(1, 16, adapter="lora")),
    Case("1 rank, dora", Layout(1, 16, adapter="dora")),
    Case("1 rank, nf4", Layout(1, 16, adapter="nf4")),
    Case("1 rank, 4 micro-batches, lora", Layout(1, 4, adapter="lora")),
    Case("1 rank, compiled, dora", Layout(1, 16, adapter="dora", compiled=True)),
    Case("ddp 2, experts 2, dora", Layout(2, 8, "ddp", experts=2, adapter="dora")),
    Case("fsdp 2, experts 2, lora", Layout(2, 8, experts=2, adapter="lora")),
    Case("fsdp 2, bf16, lora", Layout(2, 8, precision="bf16", adapter="lora")),
    Case("fsdp 2, experts 2, nf4", Layout(2, 8, experts=2, adapter="nf4")),
    Case("zero-0 2, experts 2, lora", zero(2, stage=0, experts=2, adapter="lora")),
    Case("zero-1 2, experts 2, dora", zero(2, stage=1, experts=2, adapter="dora")),
    Case("zero-2 2, experts 2, lora", zero(2, stage=2, experts=2, adapter="lora")),
    Case("zero-3 2, experts 2, dora", zero(2, stage=3, experts=2, adapter="dora")),
    Case("zero-3 2, experts 2, nf4", zero(2, stage=3, experts=2, adapter="nf4")),
    Case("zero-3 2, experts 2, bf16, lora", zero(2, stage=3, experts=2, precision="bf16", adapter="lora")),
    Case("fsdp 4, lora", Layout(4, 4, adapter="lora")),
    Case("fsdp 4, experts 2, full, dora", Layout(4, 4, experts=2, checkpointing="full", adapter="dora")),
    Case(
        "fsdp 4, experts 2, selective, lora",
        Layout(4, 4, experts=2, checkpointing="selective", adapter="lora"),
    ),
    Case("hsdp 2x2, experts 2, lora", Layout(4, 2, experts=2, copies=2, adapter="lora")),
    Case("1 rank, muon", Layout(1, 16, optimizer="muon")),
    Case("ddp 2, experts 2, muon", Layout(2, 8, "ddp", experts=2, optimizer="muon")),
    Case("fsdp 4, experts 2, muon", Layout(4, 4, experts=2, optimizer="muon")),
    Case("hsdp 2x2, muon", Layout(4, 4, copies=2, optimizer="muon")),
    Case("1 rank, normuon", Layout(1, 16, optimizer="normuon")),
    Case("fsdp 4, experts 2, normuon", Layout(4, 4, experts=2, optimizer="normuon")),
    Case("1 rank, moments in bf16", Layout(1, 16, optimizer="moments in bf16")),
    Case("fsdp 4, experts 2, moments in bf16", Layout(4, 4, experts=2, optimizer="moments in bf16")),
    # With one micro-batch per step, these scopes are that of the global batch.
    Case("ddp 2, experts 2, all ranks", Layout(2, 8, "ddp", experts=2, balancing="all_ranks")),
    Case("fsdp 4, experts 2, running", Layout(4, 4, experts=2, balancing="running")),
    Case("1 rank, loss_free", Layout(1, 16, balancing="loss_free")),
    Case("zero-3 2, experts 2, loss_free", zero(2, stage=3, experts=2, balancing="loss_free")),
    Case(
        "hsdp 2x2, experts 2, full, loss_free",
        Layout(4, 2, experts=2, copies=2, checkpointing="full", balancing="loss_free"),
    ),
    Case("zero-3 4, experts 1, lora", zero(4, stage=3, adapter="lora")),
    Case("1 rank, padded, ablated", Layout(1, 16, padded=True, ablated=True)),
    Case("zero-3 2, experts 2, padded, ablated", zero(2, stage=3, experts=2, padded=True, ablated=True)),
    Case(
        "fsdp 4, experts 2, padded, full, ablated",
        Layout(4, 2, experts=2, padded=True, checkpointing="full", ablated=True),
    ),
    Case(
        "hsdp 2x2, experts 2, padded, bf16, ablated",
        Layout(4, 4, experts=2, copies=2, padded=True, precision="bf16", ablated=True),
    ),
]
LAYOUTS = {case.name: case.layout for case in CASES}


@dataclass(frozen=True)
class Result:
    metrics: list[dict[str, Any]]
    """One entry per step, as in metrics.jsonl."""
    initial: dict[str, Tensor]
    """What is trained, before the first step."""
    final: dict[str, Tensor]
    """What the checkpoint holds."""
    average: dict[str, Tensor]
    """The average of the weights in the checkpoint; empty for runs without trainer.ema_decay."""


# --- running one layout -----------------------------------------------------------------------------------


def padded_batches(layout: Layout) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of one global stream of sequences of any length, padded in front.

    Each is as long as its longest sequence: of four ranks the first one's are whole, the last one's have two
    tokens and no padding, and with one rank nearly half of everything is padding.
    """
    stream = torch.tensor([token for document in real_tokens() for token in document])
    rank, per_rank = dist.get_rank(), SEQUENCES // dist.get_world_size()
    for step in range(STEPS):
        ids_BS = stream[step * SEQUENCES * LENGTH :][: SEQUENCES * LENGTH].view(SEQUENCES, LENGTH).clone()
        lengths_B = torch.tensor([LENGTH, 25 + step, 11, 2]).repeat_interleave(SEQUENCES // 4)
        mask_BS = torch.arange(LENGTH) >= LENGTH - lengths_B[:, None]
        ids_BS[~mask_BS] = PAD
        # Nor is the first token a target: padding would have to predict it.
        labels_BS = ids_BS.masked_fill(torch.arange(LENGTH) <= LENGTH - lengths_B[:, None], -100)
        batch = {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": mask_BS.long()}
        for start in range(rank * per_rank, (rank + 1) * per_rank, layout.micro_batch):
            rows = slice(start, start + layout.micro_batch)
            yield {name: tensor[rows, -lengths_B[rows].max() :] for name, tensor in batch.items()}


def train_layouts(tiny: TrainConfig, layouts: dict[str, Layout], directory: Path) -> dict[str, Result]:
    results = {}
    for name, layout in layouts.items():
        run_dir = directory / name.replace(", ", "-").replace(" ", "-")
        cfg = layout.config(tiny, run_dir, directory.parent / "base")
        initial = initial_weights(cfg)
        train(cfg, padded_batches(layout) if layout.padded else None)
        if dist.get_rank() == 0:
            final = saved_weights(run_dir)
            assert final.keys() == initial.keys()
            average = saved_weights(run_dir, which=Weights.ema)
            results[name] = Result(metrics(run_dir), initial, final, average)
        dist.barrier()
    return results


def initial_weights(cfg: TrainConfig) -> dict[str, Tensor]:
    model = build_model(cfg, build_mesh(cfg.parallel, init_distributed("cpu")))
    trained = {n: whole(parameter) for n, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer.clone() for name, buffer in persistent_buffers(model).items()}


def selected_layouts(items: list[pytest.Item]) -> set[str]:
    """The layouts of the tests that will run, and those that their results are compared with."""
    here = [item for item in items if isinstance(item, pytest.Function) and item.path == Path(__file__)]
    named = {str(item.callspec.params["name"]) for item in here if hasattr(item, "callspec")}
    return named | {reference_of(name) for name in named} | {"1 rank"}


def train_each(
    ranks: int, tiny: TrainConfig, layouts: dict[str, Layout], directory: Path
) -> dict[str, Result | RankError]:
    """The result of each layout, or why it has none.

    All share one spawn. When a layout ends the spawn, each trains in a spawn of its own, and the error
    belongs to the layout that raised it.
    """
    outcomes: dict[str, Result | RankError] = {}
    together = (tiny, layouts, directory / "shared")
    try:
        return outcomes | run_ranks(ranks, train_layouts, *together, timeout=1500)[0]
    except RankError as error:
        shared_error = error
    for name, layout in layouts.items():
        arguments = (tiny, {name: layout}, directory / "separate")
        try:
            outcomes |= run_ranks(ranks, train_layouts, *arguments, timeout=600)[0]
        except RankError as error:
            outcomes[name] = error
    if not any(isinstance(outcome, RankError) for outcome in outcomes.values()):
        raise shared_error  # it needs several layouts in one process, or chance: not to be hidden
    return outcomes


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Result]:
    """A function from a layout's name to its result; it fails the test where the layout did not train."""
    directory = tmp_path_factory.mktemp("equivalence")
    write_prepared(directory / "data", real_tokens(), real_tokens()[:1], vocab_size=258)
    write_lines(directory / "lines", "a*.py")
    write_lines(directory / "others", "b*.py")
    tiny = compose(TINY | {"data.dir": directory / "data"})
    torch.manual_seed(0)
    OlmoeForCausalLM(olmoe_config(tiny.model)).save_pretrained(directory / "base")
    selected = selected_layouts(request.session.items)
    outcomes: dict[str, Result | RankError] = {}
    for ranks in (1, 2, 4):
        layouts = {
            case.name: case.layout for case in CASES if case.name in selected and case.layout.ranks == ranks
        }
        if layouts:
            outcomes |= train_each(ranks, tiny, layouts, directory)

    def result_of(name: str) -> Result:
        outcome = outcomes[name]
        if isinstance(outcome, RankError):
            pytest.fail(f"the layout {name!r} did not train: {outcome}", pytrace=False)
        return outcome

    return result_of


# --- the comparisons --------------------------------------------------------------------------------------


def reference_of(name: str) -> str:
    if adapter := LAYOUTS[name].adapter:
        return f"1 rank, {adapter}"
    if LAYOUTS[name].optimizer != "adamw":
        return f"1 rank, {LAYOUTS[name].optimizer}"
    if LAYOUTS[name].ablated:
        return "1 rank, padded, ablated"
    if LAYOUTS[name].balancing == "loss_free":
        return "1 rank, loss_free"
    if LAYOUTS[name].documents:
        return "1 rank, documents"
    return "1 rank, padded" if LAYOUTS[name].padded else "1 rank"


def relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)


IN_FP32 = [
    name for name, layout in LAYOUTS.items() if layout.precision == "fp32" and name != reference_of(name)
]
IN_BF16 = [name for name, layout in LAYOUTS.items() if layout.precision == "bf16"]


@pytest.mark.parametrize("name", IN_FP32)
def test_losses_and_gradient_norms_are_the_same(trained: Callable[[str], Result], name: str) -> None:
    found, reference = trained(name).metrics, trained(reference_of(name)).metrics
    assert len(found) == len(reference) == STEPS
    for step, expected in zip(found, reference, strict=True):
        assert step["tokens"] == expected["tokens"]
        for loss in LOSSES:
            assert relative(step[loss], expected[loss]) < 2e-5, (step["step"], loss)
        if of_sequences := expected.get("train/sequence_balancing_loss"):
            assert relative(step["train/sequence_balancing_loss"], of_sequences) < 2e-5, step["step"]
        assert relative(step["train/grad_norm"], expected["train/grad_norm"]) < 1e-4, step["step"]
        assert expected["train/grad_norm"] > 2 * TINY["optimizer.max_grad_norm"]  # clipping is at work


@pytest.mark.parametrize("name", IN_FP32)
def test_final_weights_are_the_same(trained: Callable[[str], Result], name: str) -> None:
    found, reference = trained(name).final, trained(reference_of(name)).final
    assert found.keys() == reference.keys()
    for parameter, expected in reference.items():
        moved = (expected - trained(name).initial[parameter]).norm()
        assert moved > 1e-3 * expected.norm(), f"{parameter} was not trained"
        error = (found[parameter] - expected).norm() / expected.norm()
        assert error < 1e-5, (parameter, error.item())


@pytest.mark.parametrize("name", [name for name in IN_FP32 if LAYOUTS[name].optimizer != "adamw"])
def test_averages_of_the_weights_are_the_same(trained: Callable[[str], Result], name: str) -> None:
    found, reference = trained(name), trained(reference_of(name))
    assert found.average.keys() == reference.average.keys() == reference.final.keys()
    for parameter, expected in reference.average.items():
        assert not torch.equal(expected, reference.final[parameter]), parameter
        error = (found.average[parameter] - expected).norm() / expected.norm()
        assert error < 1e-5, (parameter, error.item())


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != reference_of(name)])
def test_every_layout_starts_from_the_same_weights(trained: Callable[[str], Result], name: str) -> None:
    has_own_weights = LAYOUTS[name].adapter or LAYOUTS[name].ablated
    reference = trained(reference_of(name) if has_own_weights else "1 rank").initial
    for parameter, expected in reference.items():
        assert torch.equal(trained(name).initial[parameter], expected), parameter


@pytest.mark.parametrize("name", IN_FP32)
def test_router_load_is_of_the_global_batch(trained: Callable[[str], Result], name: str) -> None:
    last, expected = trained(name).metrics[-1], trained(reference_of(name)).metrics[-1]
    for layer in range(3):
        key = f"router/layer_{layer:02d}/load"
        assert last[key] == pytest.approx(expected[key], abs=1e-6)


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_does_not_drift(trained: Callable[[str], Result], name: str) -> None:
    for step, expected in zip(trained(name).metrics, trained(reference_of(name)).metrics, strict=True):
        for loss in LOSSES:
            assert relative(step[loss], expected[loss]) < 0.01, (step["step"], loss)


@pytest.mark.parametrize("name", ["1 rank, documents"])
def test_documents_were_packed_and_mixed(trained: Callable[[str], Result], name: str) -> None:
    last = trained(name).metrics[-1]
    assert 0 < last["data/padding"] < 0.2
    assert last["data/lines/share"] == pytest.approx(last["data/lines/requested_share"], abs=0.02)


def test_the_layouts_trained_something(trained: Callable[[str], Result]) -> None:
    first, *_, last = (step["train/ce_loss"] for step in trained("1 rank").metrics)
    assert last < first - 0.1

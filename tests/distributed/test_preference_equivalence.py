"""Preference tuning under every layout: the real train(), six steps, the same losses, metrics and weights.

Completions have 10 or 90 tokens, so micro-batches of the same number of pairs differ in their tokens. The
reference is one rank with one packed micro-batch. Each world size is spawned once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.choices import Packing, PreferenceKind, Reference
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.train import train
from tests.support.faults import records, saved_weights
from tests.support.preferences import Document, pair, write_preferences
from tests.support.ranks import run_ranks
from tests.support.runs import STEPS, TINY, Layout, compose, real_tokens

PAIRS, LENGTH = 8, 96
"""Pairs of a step; tokens of a sequence."""
DPO, KTO = PreferenceConfig(beta=0.5), PreferenceConfig(kind=PreferenceKind.kto, beta=0.5)
NORM = PreferenceConfig(kind=PreferenceKind.dpo_norm, beta=5.0, sft_weight=0.1)
LIVE, KTO_LIVE = (replace(one, reference=Reference.live) for one in (DPO, KTO))


@dataclass(frozen=True)
class Case:
    name: str
    layout: Layout
    objective: PreferenceConfig = field(default=DPO)
    packing: Packing = Packing.best_fit


def zero(ranks: int, micro_batch: int, stage: int, experts: int = 1, **changes: Any) -> Layout:
    return Layout(ranks, micro_batch, "deepspeed", experts, zero_stage=stage, **changes)


CASES = [
    Case("dpo", Layout(1, 8)),
    Case("dpo, micro-batches of 4", Layout(1, 4)),
    Case("dpo, micro-batches of 2", Layout(1, 2)),
    Case("dpo, micro-batches of 1", Layout(1, 1)),
    Case("dpo, padded", Layout(1, 8), packing=Packing.none),
    Case("dpo, padded, micro-batches of 2", Layout(1, 2), packing=Packing.none),
    Case("dpo, live", Layout(1, 8), LIVE),
    Case("dpo_norm", Layout(1, 8), NORM),
    Case("kto", Layout(1, 8), KTO),
    Case("kto, padded, micro-batches of 1", Layout(1, 1), KTO, Packing.none),
    Case("kto, live", Layout(1, 8), KTO_LIVE),
    Case("dpo, lora", Layout(1, 8, adapter="lora_frozen_router"), LIVE),
    Case("dpo, lora, cached", Layout(1, 8, adapter="lora_frozen_router")),
    Case("dpo, dora, live", Layout(1, 8, adapter="dora"), LIVE),
    Case("dpo, dora, cached", Layout(1, 8, adapter="dora")),
    Case("dpo, fsdp 2", Layout(2, 4)),
    Case("dpo, fsdp 2, experts 2", Layout(2, 2, experts=2)),
    Case("dpo, fsdp 2, experts 2, padded", Layout(2, 1, experts=2), packing=Packing.none),
    Case("dpo, ddp 2, live", Layout(2, 2, "ddp"), LIVE),
    Case("dpo, zero-2 2", zero(2, 4, stage=2)),
    Case("dpo, zero-2 2, experts 2, live", zero(2, 2, stage=2, experts=2), LIVE),
    Case("dpo, zero-3 2, experts 2", zero(2, 1, stage=3, experts=2)),
    Case("dpo_norm, fsdp 2, experts 2", Layout(2, 2, experts=2), NORM),
    Case("kto, fsdp 2, experts 2", Layout(2, 2, experts=2), KTO),
    Case("kto, zero-3 2", zero(2, 2, stage=3), KTO),
    Case("kto, fsdp 2, experts 2, live", Layout(2, 2, experts=2), KTO_LIVE),
    Case("dpo, fsdp 2, experts 2, live", Layout(2, 2, experts=2), LIVE),
    Case("dpo, zero-3 2, experts 2, live", zero(2, 1, stage=3, experts=2), LIVE),
    Case("dpo, fsdp 2, experts 2, bf16", Layout(2, 2, experts=2, precision="bf16")),
    Case("dpo, fsdp 2, experts 2, bf16, live", Layout(2, 2, experts=2, precision="bf16"), LIVE),
    Case("dpo, fsdp 2, experts 2, lora", Layout(2, 2, experts=2, adapter="lora_frozen_router"), LIVE),
    Case("dpo, fsdp 4", Layout(4, 1)),
    Case("dpo, fsdp 4, experts 2", Layout(4, 2, experts=2, checkpointing="full")),
    Case("dpo, hsdp 2x2, experts 2, live", Layout(4, 1, experts=2, copies=2), LIVE),
    Case("dpo, zero-2 4, padded", zero(4, 2, stage=2), packing=Packing.none),
    Case("dpo, zero-3 4, experts 2", zero(4, 1, stage=3, experts=2)),
    Case("kto, fsdp 4, experts 4, live", Layout(4, 1, experts=4), KTO_LIVE),
]
BY_NAME = {case.name: case for case in CASES}


def reference_of(name: str) -> str:
    adapter = BY_NAME[name].layout.adapter
    if adapter:
        return "dpo, dora, live" if adapter == "dora" else "dpo, lora"
    return name.split(",")[0]


def documents() -> list[Document]:
    """52 pairs: the six steps are within the first epoch, which is not a whole number of steps."""
    stream = [token for document in real_tokens() for token in document]
    found: list[Document] = []
    at = 0
    for number in range(52):
        sides = []
        for length in ((10, 90), (90, 10), (10, 10), (90, 90))[number % 4]:
            sides.append(stream[at : at + length - 1])  # and the eos
            at += length
        found += pair(stream[at : at + 4], *sides)
        at += 4
    return found


@dataclass(frozen=True)
class Result:
    metrics: list[dict[str, Any]]
    final: dict[str, Tensor]


def config(tiny: TrainConfig, case: Case, run_dir: Path, base: Path) -> TrainConfig:
    cfg = case.layout.config(tiny, run_dir, base)
    data = replace(cfg.data, packing=case.packing, mask_documents=case.packing is Packing.best_fit)
    model = replace(cfg.model, init_from=str(base))
    return replace(cfg, data=data, model=model, objective=case.objective)


def train_cases(tiny: TrainConfig, names: list[str], directory: Path) -> dict[str, Result]:
    results = {}
    for name in names:
        run_dir = directory / name.replace(", ", "-").replace(" ", "-")
        train(config(tiny, BY_NAME[name], run_dir, directory / "base"))
        if dist.get_rank() == 0:
            results[name] = Result(records(run_dir), saved_weights(run_dir))
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Result]:
    """A function from a case's name to its result; only the cases of the selected tests are trained."""
    directory = tmp_path_factory.mktemp("preferences")
    write_preferences(directory / "data", documents(), documents()[:6], vocab_size=258)
    tiny = compose(
        TINY
        | {
            "objective": "preference",
            "data.dir": directory / "data",
            "data.sequence_length": LENGTH,
            "model.max_position_embeddings": LENGTH,
            "trainer.global_batch_size": PAIRS,
        }
    )
    # Layouts differ where two experts of a token nearly tie and rounding decides. In the validation of "dpo,
    # lora" the scores of a token's second and third expert are never closer than 8e-4 (relative) with this
    # seed; with seed 0 they come as close as 9e-7, and "dpo, fsdp 2, experts 2, lora" chooses the other one.
    torch.manual_seed(2)
    OlmoeForCausalLM(olmoe_config(tiny.model)).save_pretrained(directory / "base")
    here = [item for item in request.session.items if item.path == Path(__file__)]
    named = {str(item.callspec.params["name"]) for item in here if hasattr(item, "callspec")} | {"dpo"}
    named |= {reference_of(name) for name in named} | {EXACT[name] for name in named & EXACT.keys()}
    results: dict[str, Result] = {}
    for ranks in (1, 2, 4):
        names = [case.name for case in CASES if case.name in named and case.layout.ranks == ranks]
        if names:
            results |= run_ranks(ranks, train_cases, tiny, names, directory, timeout=900)[0]
    return results.__getitem__


OTHERS = [
    case.name for case in CASES if case.name != reference_of(case.name) and case.layout.precision == "fp32"
]
EXACT = {
    "dpo, live": "dpo",
    "kto, live": "kto",
    "dpo, lora": "dpo, lora, cached",
    "dpo, dora, live": "dpo, dora, cached",
    "dpo, fsdp 2, experts 2, live": "dpo, fsdp 2, experts 2",
    "dpo, fsdp 2, experts 2, bf16, live": "dpo, fsdp 2, experts 2, bf16",
    "kto, fsdp 2, experts 2, live": "kto, fsdp 2, experts 2",
    "dpo, zero-3 2, experts 2, live": "dpo, zero-3 2, experts 2",
}
"""A live reference -> the same layout with stored log-probabilities."""
COMPARED = ("train/", "rewards/", "rewards_per_token/", "logps/", "kl", "eval/")


@pytest.mark.parametrize("name", OTHERS)
def test_losses_metrics_and_weights_are_the_same(trained: Callable[[str], Result], name: str) -> None:
    found, reference = trained(name), trained(reference_of(name))
    assert len(found.metrics) == len(reference.metrics) == STEPS + 1  # and the validation
    for step, expected in zip(found.metrics, reference.metrics, strict=True):
        assert step["tokens"] == expected["tokens"]
        for key in (key for key in expected if key.startswith(COMPARED)):
            # Rewards are differences of sums of some 500 nats, in which the layouts differ by rounding.
            limit = 2e-5 if key.endswith(("loss", "logps/chosen", "logps/rejected")) else 2e-4
            assert step[key] == pytest.approx(expected[key], rel=limit, abs=limit), (step["step"], key)
    for parameter, value in reference.final.items():
        assert (found.final[parameter] - value).abs().max() < 1e-5, parameter


@pytest.mark.parametrize("name", EXACT)
def test_live_and_stored_references_are_the_same_bit_for_bit(
    trained: Callable[[str], Result], name: str
) -> None:
    found, expected = trained(name), trained(EXACT[name])
    for step, other in zip(found.metrics, expected.metrics, strict=True):
        same = {key: value for key, value in other.items() if key.startswith(COMPARED)}
        assert same == {key: step[key] for key in same}
    for parameter, value in expected.final.items():
        assert torch.equal(found.final[parameter], value), parameter


def test_the_first_loss_is_ln_2(trained: Callable[[str], Result]) -> None:
    first = trained("dpo").metrics[0]
    assert first["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.5, "every pair is a tie"

"""Runs with objective=preference on one rank: what they learn, resume, refuse, and what peers get wrong."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.train import train
from olmoe_train.training import build_objective
from olmoe_train.training.batch import Batch, Totals
from olmoe_train.training.objectives.preference import Preference
from olmoe_train.utils.errors import UserError
from tests.support.data import EOS
from tests.support.faults import metrics, records, same, saved_weights, without_timing
from tests.support.preferences import Document, pair, write_preferences
from tests.support.runs import TINY, compose

LENGTH = 32
Config = Callable[..., TrainConfig]


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(2, 258) for _ in range(count)]


def pairs(count: int, seed: int = 0) -> list[Document]:
    """Random pairs; only the chosen completions hold the token 7."""
    draw = random.Random(seed)
    found: list[Document] = []
    for _ in range(count):
        lengths = [draw.randint(2, 12) for _ in range(2)]
        chosen, rejected = ([8 if token == 7 else token for token in tokens(draw, n)] for n in lengths)
        chosen[len(chosen) // 2] = 7
        found += pair(tokens(draw, draw.randint(2, 6)), chosen, rejected)
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data/, other/ (data with other tokens), base/ and other_base/ (models)."""
    directory = tmp_path_factory.mktemp("preference")
    write_preferences(directory / "data", pairs(64), pairs(8, seed=1), vocab_size=258)
    write_preferences(directory / "other", pairs(64, seed=2), pairs(8, seed=1), vocab_size=258)
    cfg = olmoe_config(compose(TINY | {"data.dir": directory / "data"}).model)
    torch.manual_seed(0)
    for name in ("base", "other_base"):
        OlmoeForCausalLM(cfg).save_pretrained(directory / name)
    return directory


@pytest.fixture
def config(parts: Path, tmp_path: Path) -> Config:
    def make(run: str = "run", **changes: Any) -> TrainConfig:
        """changes: values by key, with __ for the dot."""
        values = TINY | {
            "objective": "preference",
            "data.dir": parts / "data",
            "data.packing": "best_fit",
            "data.mask_documents": True,
            "data.sequence_length": LENGTH,
            "model.init_from": parts / "base",
            "run_dir": tmp_path / run,
            "trainer.global_batch_size": 8,
            "trainer.micro_batch_size": 4,
        }
        values = {key: value for key, value in values.items() if key in KEPT or not key.startswith("model.")}
        return compose(values | {key.replace("__", "."): value for key, value in changes.items()})

    return make


KEPT = ("model.init_from",)


def test_64_pairs_are_learnt(config: Config) -> None:
    cfg = config(trainer__max_steps=100, trainer__global_batch_size=16, optimizer__max_grad_norm=1.0)
    train(cfg)
    steps = metrics(cfg.run_dir)
    assert steps[0]["rewards/accuracies"] == 0.5
    assert sum(step["rewards/accuracies"] for step in steps[-4:]) / 4 >= 0.95  # the last 64 pairs
    assert steps[-1]["train/preference_loss"] < 0.3


class TokenWeighted(Preference):
    """As in open-instruct: a micro-batch's mean over pairs is weighted by the tokens of the micro-batch."""

    def __call__(
        self, model: OlmoeForCausalLM, micro_batch: Batch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = super().__call__(model, micro_batch, totals)
        share = self.samples / (len(micro_batch["document_ids"]) // 2)
        return loss * share * micro_batch["completion_lengths"].sum() / totals.num_targets, terms


@pytest.mark.parametrize(("objective", "is_invariant"), [(Preference, True), (TokenWeighted, False)])
def test_the_loss_weighs_pairs_and_not_tokens(
    config: Config, monkeypatch: pytest.MonkeyPatch, objective: type[Preference], is_invariant: bool
) -> None:
    monkeypatch.setattr(build_objective, "Preference", objective)
    losses = []
    for size in (8, 1):
        cfg = config(
            f"size-{size}",
            trainer__micro_batch_size=size,
            objective__kind="ipo",  # its gradients differ between pairs from the first step on
            loss__router_aux_loss_coef=0,
            loss__router_z_loss_coef=0,
        )
        train(cfg)
        losses.append([record["train/loss"] for record in metrics(cfg.run_dir)])
    assert (losses[1] == pytest.approx(losses[0], rel=2e-5)) is is_invariant


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective__kind": "kto", "objective__reference": "live", "data__packing": "none"},
        {"objective__reference": "live", "adapter": "lora", "adapter__dropout": 0.1},
    ],
    ids=["dpo", "kto, live", "lora"],
)
def test_a_run_in_two_parts_is_the_run_in_one(config: Config, changes: dict[str, Any]) -> None:
    """The second part starts from trained weights, and its reference is that of the first part."""
    whole = config("whole", trainer__max_steps=10, **changes)
    train(whole)
    for end in (5, 10):
        cfg = config("parts", trainer__max_steps=10, trainer__stop_at_step=end, **changes)
        train(cfg)
        if end == 5 and not changes:
            # The run computes them again, with the initial weights.
            shutil.rmtree(Path(cfg.run_dir) / "logprobs")
    for one, other in zip(metrics(whole.run_dir), metrics(cfg.run_dir), strict=True):
        assert without_timing(one) == without_timing(other)
    assert same(saved_weights(whole.run_dir, 10), saved_weights(cfg.run_dir, 10))


def test_what_changes_no_result_may_change_in_between(config: Config, tmp_path: Path) -> None:
    whole = config("whole", trainer__max_steps=6)
    train(whole)
    train(config("parts", trainer__max_steps=6, trainer__stop_at_step=3))
    others = {"data__packing": "none", "data__mask_documents": False, "trainer__micro_batch_size": 2}
    stored = {"objective__logprobs_dir": tmp_path / "elsewhere"}
    train(config("parts", trainer__max_steps=6, trainer__stop_at_step=5, **others, **stored))
    last = config("parts", trainer__max_steps=6, objective__reference="live", **others)
    train(last)
    for one, other in zip(metrics(whole.run_dir), metrics(last.run_dir), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=2e-5)
    expected = saved_weights(whole.run_dir, 6)
    for name, tensor in saved_weights(last.run_dir, 6).items():
        assert (tensor - expected[name]).abs().max() < 1e-5, name


def test_stale_log_probs_are_refused_with_both_hashes(config: Config, parts: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    train(config("first", objective__logprobs_dir=stored, trainer__max_steps=1))
    manifest = json.loads((stored / "manifest.json").read_text())
    other_model = config("a", objective__logprobs_dir=stored, model__init_from=parts / "other_base")
    other_data = config("b", objective__logprobs_dir=stored, data__dir=parts / "other")
    for cfg, what, other in ((other_model, "model", "data"), (other_data, "data", "model")):
        with pytest.raises(
            UserError, match=f"{what}: hash {manifest[what]} there, [0-9a-f]{{32}} in"
        ) as error:
            train(cfg)
        assert f"{other}: hash" not in str(error.value)
        dist.destroy_process_group()
    precision = config("c", objective__logprobs_dir=stored, trainer__precision="bf16")
    with pytest.raises(UserError, match=f"model: hash {manifest['model']} there"):
        train(precision)
    dist.destroy_process_group()
    (stored / "train.f64").write_bytes(b"\0" * (stored / "train.f64").stat().st_size)
    with pytest.raises(UserError, match=r"train\.f64: missing or damaged"):
        train(config("e", objective__logprobs_dir=stored))


def test_configurations_that_make_no_sense_are_refused(config: Config, parts: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "data.packing=concat: cuts documents": {"data__packing": "concat"},
        "data.mask_documents=false with data.packing=best_fit": {"data__mask_documents": False},
        "objective.reference=none: objective.kind=dpo compares": {"objective__reference": "none"},
        "objective.reference=cached: objective.kind=orpo has no": {
            "objective__reference": "cached",
            "objective__kind": "orpo",
        },
        "trainer.max_tokens=1000: a step": {"trainer__max_tokens": 1000},
        "objective.label_smoothing=0.5": {"objective__label_smoothing": 0.5},
        "adapter.router=full changes that model": {
            "objective__reference": "live",
            "adapter": "lora",
            "adapter__router": "full",
        },
        "data.sequence_length=8: data.dir=": {"data__sequence_length": 8},
        "has files and no manifest.json; give another": {"objective__logprobs_dir": parts / "base" / ".."},
        "holds preferences; set objective=preference": {"objective": "next_token"},
    }
    for message, changes in refused.items():
        with pytest.raises(UserError) as error:
            train(config("refused", **changes))
        assert message in str(error.value)
        assert not Path(config("refused").run_dir, "checkpoints").exists()


def test_the_sft_term_is_a_mean_over_pairs(config: Config, parts: Path) -> None:
    """Its weight adds to the loss of training and of validation. Its value is that of Transformers' model."""
    changes = {"trainer__max_steps": 1, "optimizer__lr": 1e-12, "trainer__global_batch_size": 64}
    without, cfg = config("without", **changes), config("with", objective__sft_weight=0.5, **changes)
    train(without)
    train(cfg)
    (step,), (plain,) = metrics(cfg.run_dir), metrics(without.run_dir)
    assert step["train/loss"] == pytest.approx(plain["train/loss"] + 0.5 * step["train/sft_loss"], rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained(parts / "base")
    means = []
    for document in (one for one in pairs(64) if one.wanted):
        ids = torch.tensor([[*document.prompt, *document.completion, EOS]])
        labels = ids.clone()
        labels[:, : len(document.prompt)] = -100
        with torch.no_grad():
            means.append(model(ids, labels=labels).loss.item())
    assert step["train/sft_loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    # Validation weighs its own pairs in the same way.
    validated = records(cfg.run_dir, "eval/validation/loss")[0]
    assert validated["eval/validation/loss"] > math.log(2) + 0.5 * 3


def test_a_frozen_reference_is_not_trained(config: Config) -> None:
    """The live reference and the stored one stay at the initial weights while the model moves."""
    cfg = config(objective__reference="live", trainer__max_steps=6)
    train(cfg)
    steps = metrics(cfg.run_dir)
    assert steps[0]["rewards/chosen"] == 0
    assert steps[-1]["rewards/chosen"] != 0

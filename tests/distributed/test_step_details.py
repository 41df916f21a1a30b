"""The costly values of a step: right, independent of the layout, and without any effect on training.

Shapes: B sequences, S positions, E experts, L layers.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from olmoe_train.config.choices import WandbMode
from olmoe_train.config.train import EvaluationConfig, LoggingConfig, TrainConfig, WandbConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import TrainSamples, collate
from olmoe_train.data.manifest import TOKENIZER
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.generation import generate
from olmoe_train.run.loggers import read_records
from olmoe_train.train import train
from olmoe_train.training.build import build_data, build_model
from olmoe_train.training.details import StepDetails, is_due
from olmoe_train.utils.errors import UserError
from tests.support.faults import same, saved_tensors, without_timing
from tests.support.prompts import write_prompts
from tests.support.ranks import run_ranks
from tests.support.runs import LENGTH, SEQUENCES, TINY, Layout, compose, write_lines

PROMPTS, NEW = ["t5", "t7 t9 t200"], 6
PARTS, STEPS = 16, 3
OFF = WandbConfig(mode=WandbMode.disabled)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A mixture of two sources of packed lines; the costly values of steps 1 and 3."""
    root = tmp_path_factory.mktemp("data")
    write_lines(root / "lines", "a*.py")
    write_lines(root / "others", "b*.py")
    cfg = compose(TINY | {"data.dir": root / "lines", "trainer.max_steps": STEPS})
    return replace(cfg, logging=LoggingConfig(details_every=1, wandb=OFF))


def train_all(configs: list[TrainConfig]) -> None:
    for cfg in configs:
        train(cfg)


def initial_model(cfg: TrainConfig) -> OlmoeForCausalLM:
    return build_model(cfg, build_mesh(cfg.parallel, init_distributed("cpu"))).eval()


def losses_by_slow_loop(cfg: TrainConfig) -> tuple[dict[str, list[float]], list[list[float]]]:
    """(Losses of the first step's targets by source, and by part of the sequence), from whole logits."""
    model, samples = initial_model(cfg), TrainSamples(cfg.data, cfg.seed)
    model.unshard()  # type: ignore[operator]  # FSDP2 gathers the root unit in the calls that it knows
    by_source: dict[str, list[float]] = {"lines": [], "others": []}
    by_part: list[list[float]] = [[] for _ in range(PARTS)]
    for index in range(SEQUENCES):
        sample = samples[index]
        batch = collate([sample])
        with torch.no_grad():
            decoded = model.model.run_layers(
                batch["input_ids"], batch["attention_mask"], document_offsets=batch["document_offsets"]
            )
            log_probs_SV = F.log_softmax(model.lm_head(decoded.last_hidden_state[0]).double(), -1)
        source = list(by_source)[samples.schedule.locate(index)[0]]
        for position, target in enumerate(sample["targets"].tolist()):
            if target != -100:
                loss = -log_probs_SV[position, target].item()
                by_source[source].append(loss)
                by_part[position * PARTS // LENGTH].append(loss)
    return by_source, by_part


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read_records(run_dir / "metrics.jsonl")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_losses_by_source_and_position(tiny: TrainConfig, tmp_path: Path) -> None:
    one = Layout(1, 4, documents=True).config(tiny, tmp_path / "one")
    two = Layout(2, 4, experts=2, documents=True).config(tiny, tmp_path / "two")
    run_ranks(1, train_all, [one])
    run_ranks(2, train_all, [two])
    ((by_source, by_part),) = run_ranks(1, losses_by_slow_loop, one)
    first = metrics(tmp_path / "one")[0]
    for name, losses in by_source.items():
        assert first[f"data/{name}/loss"] == pytest.approx(mean(losses), rel=1e-5)
    assert first["train/loss_by_position"] == pytest.approx([mean(losses) for losses in by_part], rel=1e-5)
    # The sources' sums make up the loss of the step.
    targets = {name: len(losses) for name, losses in by_source.items()}
    total = sum(first[f"data/{name}/loss"] * count for name, count in targets.items())
    assert first["train/ce_loss"] == pytest.approx(total / sum(targets.values()), rel=1e-6)
    layers = [first[f"router/layer_{layer:02d}/z"] for layer in range(3)]
    assert first["train/router_z_loss"] == pytest.approx(mean(layers), rel=1e-6)
    for row, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        keys = [key for key in row if key.startswith("data/") or key.endswith(("_by_position", "/z"))]
        assert len(keys) == (11 + 1 + 3 if "train/loss" in row else 3)
        for key in keys:
            assert other[key] == pytest.approx(row[key], rel=1e-5), (row["step"], key)
    evaluated = metrics(tmp_path / "one")[-1]
    parts = evaluated["eval/validation/loss_by_position"]
    assert len(parts) == PARTS
    assert min(parts) < evaluated["eval/validation/loss"] < max(parts)


def test_training_is_bit_for_bit_the_same_with_and_without(tiny: TrainConfig, tmp_path: Path) -> None:
    """With dropout, two micro-batches, recomputation and the routing flow."""
    with_dropout = replace(tiny, model=replace(tiny.model, attention_dropout=0.1))
    layout = Layout(1, 8, documents=True, checkpointing="full")
    on = layout.config(with_dropout, tmp_path / "on")
    on = replace(on, logging=replace(on.logging, wandb=WandbConfig(mode=WandbMode.offline)))
    off = layout.config(with_dropout, tmp_path / "off")
    off = replace(off, logging=replace(off.logging, details_every=0))
    run_ranks(1, train_all, [on, off])
    assert same(saved_tensors(tmp_path / "on", STEPS), saved_tensors(tmp_path / "off", STEPS))
    for row, other in zip(metrics(tmp_path / "on"), metrics(tmp_path / "off"), strict=True):
        measured = {"train/loss_by_position", "data/lines/loss", "data/others/loss"}
        assert row.keys() - other.keys() == (measured if "train/loss" in row else set())
        assert {key: without_timing(row)[key] for key in without_timing(other)} == without_timing(other)


def flow_of_two_micro_batches(cfg: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(The flow that StepDetails counts, the same from the router logits by a slow loop)."""
    model, data = initial_model(cfg), build_data(cfg)
    cpu, sizes = torch.device("cpu"), BatchSizes(4)
    details = StepDetails(
        *(model, data),
        every=1,
        log_every=1,
        last_step=9,
        sizes=sizes,
        micro_batch_size=2,
        with_flow=True,
        device=cpu,
    )
    details.prepare(1, 0)
    experts = cfg.model.num_experts
    expected = torch.zeros(cfg.model.num_hidden_layers - 1, experts, experts)
    samples = TrainSamples(cfg.data, cfg.seed)
    for first in (0, 2):
        batch = collate([samples[first], samples[first + 1]])
        del batch["document_offsets"]
        batch.pop("repetitive", None)
        model.training_forward(**batch)
        with torch.no_grad():
            model.training_forward(**batch)  # validation, for example: not observed
            logits = model.model.run_layers(
                batch["input_ids"], batch["attention_mask"], output_router_logits=True
            ).router_logits
        assert logits is not None
        best_LT = torch.stack(logits).argmax(-1)
        for token, is_real in enumerate(batch["attention_mask"].flatten().tolist()):
            for layer in range(len(expected)):
                expected[layer, best_LT[layer, token], best_LT[layer + 1, token]] += is_real
    _, flow = details.read()
    assert flow is not None
    return flow, expected


def test_the_routing_flow(tiny: TrainConfig, tmp_path: Path) -> None:
    cfg = Layout(1, 2, documents=True).config(tiny, tmp_path)
    ((flow, expected),) = run_ranks(1, flow_of_two_micro_batches, cfg)
    assert expected.sum() > 100
    assert torch.equal(flow, expected)


def test_which_steps_have_costly_values() -> None:
    assert [step for step in range(1, 101) if is_due(step, 25, 10, 97)] == [30, 50, 80, 97, 100]
    assert [step for step in range(1, 9) if is_due(step, 1, 2, 9)] == [2, 4, 6, 8]
    assert not any(is_due(step, 0, 1, 3) for step in range(1, 9))


# --- samples ------------------------------------------------------------------------------------------------


def with_prompts(root: Path, **changes: Any) -> TrainConfig:
    root.mkdir(exist_ok=True)
    write_prompts(root)
    cfg = compose(TINY | {"data.dir": root / "data", "trainer.max_steps": 2})
    evaluation = EvaluationConfig(at_start=True, prompts=PROMPTS, sample_tokens=NEW)
    return replace(cfg, evaluation=replace(evaluation, **changes))


def completions_one_by_one(cfg: TrainConfig) -> list[str]:
    model = initial_model(cfg)
    tokenizer = Tokenizer.from_file(f"{cfg.data.dir}/{TOKENIZER}/tokenizer.json")
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        new = generate(model, torch.tensor([ids]), max_new_tokens=NEW)[0, len(ids) :].tolist()
        texts.append(tokenizer.decode([token for token in new if token != cfg.model.eos_token_id]))
    return texts


def test_each_evaluation_continues_the_prompts_in_every_layout(tmp_path: Path) -> None:
    cfg = with_prompts(tmp_path)
    one = Layout(1, 8).config(cfg, tmp_path / "one")
    run_ranks(1, train_all, [one])
    run_ranks(2, train_all, [Layout(2, 8, experts=2).config(cfg, tmp_path / "two")])
    (expected,) = run_ranks(1, completions_one_by_one, one)
    runs = [[row for row in metrics(tmp_path / name) if "eval/samples" in row] for name in ("one", "two")]
    for rows in runs:
        assert [row["step"] for row in rows] == [0, 2]
        assert [sample["prompt"] for sample in rows[0]["eval/samples"]] == PROMPTS
        assert [sample["completion"] for sample in rows[0]["eval/samples"]] == expected
    assert runs[0][1]["eval/samples"] == runs[1][1]["eval/samples"]


def refusal(cfg: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        train(cfg)
    return str(caught.value)


def test_prompts_that_cannot_be_continued_are_refused(tmp_path: Path) -> None:
    cfg = with_prompts(tmp_path, prompts=["", " ".join(PROMPTS * 7)])
    (message,) = run_ranks(1, refusal, Layout(1, 8).config(cfg, tmp_path / "run"))
    assert "evaluation.prompts[0]: is empty" in message
    assert (
        "evaluation.prompts[1]: the prompt (28 tokens) and evaluation.sample_tokens=6 together exceed"
        in message
    )
    zero = Layout(1, 8, "deepspeed").config(with_prompts(tmp_path / "other"), tmp_path / "run")
    (message,) = run_ranks(1, refusal, zero)
    assert "evaluation.prompts: has 2 prompts to continue, and with parallel.strategy=deepspeed" in message

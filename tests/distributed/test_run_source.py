"""A run's sharded checkpoint as a source: export, generate and evaluate without the ranks that made it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import (
    load_into,
    load_stored_model,
    run_checkpoint,
    tokenizer_directory,
)
from olmoe_train.checkpoint.sharded import save_checkpoint
from olmoe_train.cli.evaluate import evaluate as evaluate_verb
from olmoe_train.cli.evaluate import main as evaluate_main
from olmoe_train.cli.export import main as export
from olmoe_train.cli.generate import main as generate
from olmoe_train.config.choices import Device, Precision, Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.generate import GenerateConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import EvaluationConfig, EvaluationSet, ParallelConfig, TrainConfig
from olmoe_train.config.verbs import EvaluateConfig, ExportConfig
from olmoe_train.data.tokenizer import load_tokenizer, train_tokenizer
from olmoe_train.evaluation.perplexity import Evaluation, evaluate_model
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.cross_entropy import shift_labels
from olmoe_train.training.preflight.model_and_data import model_errors
from olmoe_train.utils.errors import UserError
from tests.support.prepared_texts import TEXTS, prepare_texts
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES
from tests.support.tasks import write_task
from tests.support.tiny import build, global_batch, train_step, whole

VOCABULARY = 300  # 256 bytes, eos, padding, and some merges
STEPS = (3, 7)
CPU = torch.device("cpu")


def train(run_dir: Path) -> dict[int, dict[str, Tensor]]:
    """Checkpoints of steps 3 and 7, and the whole parameters that they hold."""
    model, optimizer = build(vocab_size=VOCABULARY)
    saved = {}
    for step in STEPS:
        train_step(model, optimizer, step)
        save_checkpoint(run_dir, step, model, optimizer, {})
        saved[step] = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return saved


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Tensor]]]:
    run_dir = tmp_path_factory.mktemp("run")
    saved = run_ranks(2, train, run_dir)[0]
    OmegaConf.save({"model": SIZES | {"vocab_size": VOCABULARY}, "seed": 1}, run_dir / "config.yaml")
    train_tokenizer(iter(["def main(argument): return argument\n"] * 20), VOCABULARY).save(
        run_dir / "tokenizer"
    )
    return run_dir, saved


@pytest.fixture
def run_dir(run: tuple[Path, dict[int, dict[str, Tensor]]]) -> Path:
    return run[0]


@pytest.fixture
def saved(run: tuple[Path, dict[int, dict[str, Tensor]]]) -> dict[int, dict[str, Tensor]]:
    return run[1]


def assert_weights(model: OlmoeForCausalLM, expected: dict[str, Tensor]) -> None:
    assert {name for name, _ in model.named_parameters()} == expected.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_export_of_the_newest_and_of_a_given_step(
    run_dir: Path, saved: dict[int, dict[str, Tensor]], tmp_path: Path
) -> None:
    for step, key in [("latest", 7), ("3", 3), ("00000007", 7)]:
        out = tmp_path / step
        export(ExportConfig(str(run_dir), step, str(out), max_shard_size="20KB"))
        assert len(list(out.glob("model-*.safetensors"))) > 1
        assert_weights(OlmoeForCausalLM.from_pretrained(out), saved[key])
        assert (out / "tokenizer.json").read_bytes() == (run_dir / "tokenizer/tokenizer.json").read_bytes()


def test_export_goes_into_the_run_directory_by_default_and_once(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(ExportConfig(str(run_dir)))
    weights = run_dir / "hf" / "step-00000007" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    capsys.readouterr()
    export(ExportConfig(str(run_dir)))
    assert "already exported" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == written


def test_export_does_not_touch_what_is_something_else(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cfg = ExportConfig(str(run_dir), out=str(out))
    export(cfg)
    before = (out / "model.safetensors").read_bytes()
    for other in (replace(cfg, step="3"), replace(cfg, precision=Precision.bf16)):
        with pytest.raises(UserError, match="not empty, and does not hold this export"):
            export(other)
    assert (out / "model.safetensors").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty, and does not hold this export"):
        export(replace(cfg, out=str(tmp_path / "notes")))


def test_export_in_bf16(run_dir: Path, saved: dict[int, dict[str, Tensor]], tmp_path: Path) -> None:
    export(ExportConfig(str(run_dir), out=str(tmp_path / "out"), precision=Precision.bf16))
    model = OlmoeForCausalLM.from_pretrained(tmp_path / "out")
    assert_weights(model, {name: tensor.bfloat16() for name, tensor in saved[7].items()})


def test_sources_that_are_none(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither an HF directory .config.json. nor a run directory"):
        load_stored_model(str(tmp_path), CPU)
    with pytest.raises(UserError, match="complete steps: 7, 3"):
        run_checkpoint(run_dir, "5")
    with pytest.raises(UserError, match="step=last: give a number, or latest"):
        run_checkpoint(run_dir, "last")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml: not the configuration of a run"):
        load_stored_model(str(tmp_path), CPU)
    OmegaConf.save({"model": SIZES}, tmp_path / "config.yaml")
    with pytest.raises(UserError, match="no complete checkpoint in"):
        load_stored_model(str(tmp_path), CPU)


def test_training_starts_from_a_run(
    run_dir: Path, saved: dict[int, dict[str, Tensor]], tmp_path: Path
) -> None:
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"vocab_size": VOCABULARY}))
    load_into(model, run_dir)
    assert_weights(model, saved[7])
    assert tokenizer_directory(run_dir) == run_dir / "tokenizer"
    OmegaConf.save({"model": SIZES}, tmp_path / "config.yaml")
    (error,) = model_errors(TrainConfig(model=ModelConfig(**SIZES, init_from=str(tmp_path))))
    assert error.startswith(f"model.init_from={tmp_path}: no complete checkpoint in")


def test_a_run_is_a_source_as_good_as_its_export(
    run_dir: Path,
    saved: dict[int, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer_dir = load_stored_model(str(run_dir), CPU)
    assert not model.training
    assert_weights(model, saved[7])
    export(ExportConfig(str(run_dir), out=str(tmp_path / "hf")))
    tokenizer = load_tokenizer(tokenizer_dir)
    prompt = "def main(argu"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12)[0].tolist())
    for source in (run_dir, tmp_path / "hf"):
        capsys.readouterr()
        generate(GenerateConfig(str(source), prompt, max_new_tokens=12))
        assert capsys.readouterr().out == expected + "\n"


def test_generate_needs_text_and_its_own_tokenizer(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        generate(GenerateConfig(str(run_dir), ""))
    export(ExportConfig(str(run_dir), out=str(tmp_path / "hf")))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        generate(GenerateConfig(str(tmp_path / "hf"), "x"))
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: missing, but needed to encode text"):
        generate(GenerateConfig(str(tmp_path / "hf"), "x"))
    (tmp_path / "hf" / "tokenizer.json").unlink(missing_ok=True)
    longer = train_tokenizer(iter([chr(65 + i % 26) * (i + 2) for i in range(99)]), VOCABULARY + 80)
    (tmp_path / "hf" / "tokenizer.json").write_bytes(longer.files["tokenizer.json"])
    with pytest.raises(UserError, match="the tokenizer belongs to another model"):
        generate(GenerateConfig(str(tmp_path / "hf"), "".join(chr(65 + i % 26) * (i + 2) for i in range(99))))


def evaluate(batches_of_rank: list[list[Tensor]]) -> tuple[float, int]:
    model, _ = build()
    rank = torch.distributed.get_rank()
    batches = [{"input_ids": ids.clamp(min=2), "targets": shift_labels(ids)} for ids in batches_of_rank[rank]]
    result = evaluate_model(model, batches, CPU)
    return result.loss, result.tokens


def test_evaluation_is_the_same_mean_on_one_rank_and_on_two() -> None:
    ids = global_batch(0)
    ids[3:] = ids[3:].masked_fill(torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) < 0.6, -100)
    # Rank 0 has many targets and rank 1 few, so a mean of the ranks' means would be another number.
    alone = run_ranks(1, evaluate, [[ids]])[0]
    together = run_ranks(2, evaluate, [[ids[:3], ids[3:4]], [ids[4:7], ids[7:]]])
    assert together[0] == together[1]
    assert together[0][1] == alone[1] == (ids[:, 1:] != -100).sum()
    assert together[0][0] == pytest.approx(alone[0], rel=1e-6)


@pytest.fixture(scope="module")
def texts(run: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared directories by name, with the tokenizer of the run."""
    root = tmp_path_factory.mktemp("texts")
    tokenizer = run[0] / "tokenizer"
    return {
        name: prepare_texts(root / name, texts, tokenizer)
        for name, texts in (("data", TEXTS), ("code", TEXTS[-1:]))
    }


ON_TWO_RANKS = (ParallelConfig(expert_parallel_size=2), ParallelConfig(), ParallelConfig(Strategy.ddp))


def evaluate_in_layouts(layouts: list[EvaluateConfig]) -> list[dict[str, Evaluation]]:
    results = [evaluate_verb(cfg, CPU)[0][0] for cfg in layouts]
    return [one.of_data | one.of_sets for one in results]


def test_the_verb_gives_the_same_on_one_process_and_on_ranks(
    run_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sharded, with the experts on two ranks, and in copies; the table and the JSON file say the same."""
    sets = [EvaluationSet("code", str(texts["code"]))]
    one = EvaluateConfig(
        [str(run_dir)],
        DataConfig(dir=str(texts["data"]), sequence_length=16),
        EvaluationConfig(micro_batch_size=1, sets=sets),
        device=Device.cpu,
        out=str(tmp_path / "alone.json"),
    )
    evaluate_main(one)
    shown = capsys.readouterr().out.splitlines()
    expected = json.loads((tmp_path / "alone.json").read_text())["sets"]
    assert list(expected) == ["validation", "code"]
    assert expected["code"]["loss"] != expected["validation"]["loss"]
    for name, values in expected.items():
        numbers = f"{values['loss']:.4f} {values['perplexity']:,.2f} {values['bits_per_byte']:.4f}"
        assert f"{name} {numbers} {values['tokens']}" in [" ".join(line.split()) for line in shown]

    layouts = [replace(one, parallel=parallel) for parallel in ON_TWO_RANKS]
    for results in run_ranks(2, evaluate_in_layouts, [*layouts, replace(one, precision=Precision.bf16)]):
        *same, rounded = results
        for result in same:
            for name, values in expected.items():
                assert (result[name].tokens, result[name].bytes) == (values["tokens"], values["bytes"])
                assert result[name].loss == pytest.approx(values["loss"], rel=1e-6)
                assert result[name].bits_per_byte == pytest.approx(values["bits_per_byte"], rel=1e-6)
        assert 1e-6 < abs(rounded["code"].loss / expected["code"]["loss"] - 1) < 1e-2


def answer_in_layouts(layouts: list[EvaluateConfig]) -> list[dict[str, list[float]]]:
    """Task and metric -> the value for each question, of each layout."""
    return [
        {
            f"{task.name}/{metric.value}": values.tolist()
            for task in evaluate_verb(cfg, CPU)[0][0].tasks
            for metric, values in task.values.items()
        }
        for cfg in layouts
    ]


def test_tasks_have_the_same_answers_on_one_process_and_on_ranks(run_dir: Path, tmp_path: Path) -> None:
    """Without data, sharded, with the experts on two ranks, and in copies; one rank has a pass less."""
    queries = ["Grüße", "def main", "数学", "🙂🙃"]
    questions = [{"query": text, "choices": ["café", "done", "x"], "gold": 1} for text in queries]
    card = write_task(tmp_path, "toy", questions, prompt="{query}")
    evaluation = EvaluationConfig(tasks=[str(card)], tokens_per_pass=8)
    one = EvaluateConfig([str(run_dir)], DataConfig(dir=""), evaluation, device=Device.cpu)
    (expected,) = run_ranks(1, answer_in_layouts, [one])[0]
    layouts = [replace(one, parallel=parallel) for parallel in ON_TWO_RANKS] + [
        replace(one, evaluation=replace(evaluation, tokens_per_pass=512))
    ]
    for results in run_ranks(2, answer_in_layouts, layouts):
        for result in results:
            assert result.keys() == expected.keys()
            for name, values in result.items():
                assert values == pytest.approx(expected[name], rel=1e-6), name
        assert results[2] == expected  # copies make the same passes


def test_several_sources_are_compared(
    run_dir: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, and the same run in bf16 weights: a small difference in loss, and none in a constant task."""
    export(ExportConfig(str(run_dir), out=str(tmp_path / "hf"), precision=Precision.bf16))
    card = write_task(tmp_path, "toy", [{"query": "a", "choices": ["b", "c" * 40], "gold": 0}] * 3)
    cfg = EvaluateConfig(
        [str(run_dir), str(tmp_path / "hf")],
        DataConfig(dir=str(texts["data"]), sequence_length=16),
        EvaluationConfig(tasks=[str(card)]),
        device=Device.cpu,
        out=str(tmp_path / "both.json"),
        precision=Precision.fp32,
    )
    evaluate_main(cfg)
    shown = capsys.readouterr().out
    assert f"[1] {run_dir}\n[2] {tmp_path / 'hf'}\n" in shown
    content = json.loads((tmp_path / "both.json").read_text())
    loss, toy = content["comparisons"]
    first, second = (source["sets"]["validation"]["loss"] for source in content["sources"])
    assert [one["value"] for one in loss["scores"]] == pytest.approx([first, second])
    # The losses sum the tokens of a pass in fp32, and the differences those of a sequence in fp64.
    assert loss["differences"][0]["value"] == pytest.approx(second - first, abs=1e-6)
    assert first != second
    assert (toy["name"], toy["metric"]) == ("toy", "acc_per_char")
    assert toy["differences"] == [{"value": 0.0, "stderr": 0.0, "noise": True}]
    assert f"{loss['scores'][0]['value']:.4f} ± {loss['scores'][0]['stderr']:.4f}" in shown


def test_the_verb_names_wrong_options(run_dir: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    one = EvaluateConfig(
        [str(run_dir)], DataConfig(dir=str(texts["data"]), sequence_length=16), device=Device.cpu
    )
    nowhere = EvaluationConfig(sets=[EvaluationSet("code", str(tmp_path / "nowhere"))])
    for changes, message in (
        ({"parallel": ParallelConfig(Strategy.deepspeed)}, "parallel.strategy=deepspeed: DeepSpeed's engine"),
        ({"parallel": ParallelConfig(expert_parallel_size=3)}, "must divide model.num_experts=8"),
        ({"out": str(tmp_path / "no" / "x.json")}, f"out=.*: there is no directory {tmp_path / 'no'}"),
        ({"evaluation": nowhere}, r"evaluation.sets\[0\].dir=.*nowhere: there is no prepared data"),
        ({"evaluation": EvaluationConfig(micro_batch_size=0)}, "micro_batch_size=0: must be positive"),
        ({"data": DataConfig(dir="")}, "there is nothing to evaluate: give prepared data"),
        ({"check_overlap": str(texts["data"])}, "check_overlap=.*: there are no questions"),
        ({"source": [str(run_dir)] * 2}, "is there twice"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_main(replace(one, **changes))

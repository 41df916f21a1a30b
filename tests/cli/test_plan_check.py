"""`olmoe plan check=true`: the recipes pass, planted mistakes are named, and what cannot be built is said."""

import hashlib
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olmoe_train.checkpoint.sharded import save_checkpoint
from olmoe_train.cli.plan_check import check_run, configuration_problems
from olmoe_train.config import compose
from olmoe_train.config.reference import config_directory
from olmoe_train.config.train import TrainConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.data.manifest import read_manifest, write_manifest
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from tests.support.commands import olmoe
from tests.support.data import write_prepared
from tests.support.hf_directories import edit_json, edit_tensors
from tests.support.preferences import pair, write_preferences
from tests.support.sizes import SIZES, overrides, section
from tests.support.tiny import build

WORLD, LENGTH = 8, 64
# The vocabulary leaves room for the 90 tokens of the data.
MODEL = SIZES | {"max_position_embeddings": 4096, "num_hidden_layers": 2}
RUN: dict[str, Any] = {
    "data.sequence_length": LENGTH,
    "trainer.max_steps": 10,
    "trainer.global_batch_size": 16,
    "trainer.micro_batch_size": 2,
}
EXPERIMENTS = sorted(path.stem for path in Path(config_directory() / "experiment").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """The group of one rank that other tests leave would be in the way of the fake one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data/ and base/, a model of the same vocabulary; both name their tokens."""
    directory = tmp_path_factory.mktemp("check")
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 90, (100,), generator=draw).tolist() for _ in range(40)]
    write_prepared(directory / "data", documents, documents[:8], vocab_size=90)
    name_tokens(directory / "data", [f"t{number}" for number in range(90)])
    OlmoeForCausalLM(OlmoeConfig(**MODEL)).save_pretrained(directory / "base")
    (directory / "base" / "tokenizer.json").write_bytes(
        (directory / "data" / "tokenizer" / "tokenizer.json").read_bytes()
    )
    return directory


def name_tokens(data: Path, texts: list[str]) -> None:
    """Give prepared data a tokenizer with these tokens."""
    manifest = read_manifest(data)
    content = json.dumps({"model": {"vocab": {text: number for number, text in enumerate(texts)}}}).encode()
    (data / "tokenizer" / "tokenizer.json").write_bytes(content)
    write_manifest(data, replace(manifest, tokenizer_sha256=hashlib.sha256(content).hexdigest()))


def plan(*words: str, gpus: int = WORLD) -> PlanConfig:
    cfg = compose(*words)
    return PlanConfig(**{field.name: getattr(cfg, field.name) for field in fields(TrainConfig)}, gpus=gpus)


@pytest.fixture
def words(parts: Path, tmp_path: Path) -> list[str]:
    """The overrides of a run that is in order."""
    places = {"data.dir": parts / "data", "run_dir": tmp_path / "run"}
    return overrides(section("model", MODEL) | RUN | places)


@pytest.fixture
def of_base(parts: Path, tmp_path: Path) -> list[str]:
    """The overrides of a run that starts from the model in base/."""
    places = {"data.dir": parts / "data", "run_dir": tmp_path / "run", "model.init_from": parts / "base"}
    return overrides(RUN | places)


def checked(capsys: pytest.CaptureFixture[str], *words: str, gpus: int = WORLD) -> dict[str, str]:
    """What the check says about each part; it finds no error."""
    check_run(plan(*words, gpus=gpus))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert not [line for line in lines if "warning" in line]
    return {line[2:15].strip(): line[17:] for line in lines}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_recipes_pass(
    name: str,
    parts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where the recipe makes its run_dir
    words, gpus = [f"experiment={name}", "data.dir=none"], 2
    if "1b_7b" in name:
        words, gpus = [*words, "model.num_hidden_layers=1"], 64
    elif name != "quickstart":
        words.append(f"model.init_from={parts / 'base'}")
    if name == "olmoe_esft":
        (tmp_path / "experts.yaml").write_text("layers: {0: [1, 2]}")
        words.append(f"trainer.train_only={tmp_path / 'experts.yaml'}")
    found = checked(capsys, *words, gpus=gpus)
    assert {part for part, text in found.items() if not text.startswith("ok")} == set()


def test_the_first_batch_is_that_of_the_data(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """4,040 tokens are 63 sequences of 64. 10 steps of 16; each of 8 ranks has one micro-batch of 2."""
    found = checked(capsys, *words)
    assert "rank 0 [2, 64], rank 7 [2, 64]" in found["first batch"]
    assert "1 of them a step, 10 steps" in found["first batch"]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_preferences_of_the_data(
    of_base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """A micro-batch of two pairs, or of two completions with two mismatched ones, is packed into rows."""
    documents = [one for number in range(32) for one in pair([2, 3], [4, number + 5], [6, 7, 8])]
    write_preferences(tmp_path / "data", documents, documents[:4], vocab_size=90)
    words = [*of_base, f"data.dir={tmp_path / 'data'}", "objective=preference", f"objective.kind={kind}"]
    found = checked(capsys, *words, "data.packing=best_fit", "data.mask_documents=true")
    assert "rank 0 [" in found["first batch"]
    assert found["step"].endswith("of one micro-batch; without the reference")


@pytest.mark.parametrize(
    ("layout", "mesh", "not_built"),
    [
        (
            ["parallel.replicate_size=2", "parallel.expert_parallel_size=2"],
            "fsdp: 2 copies x 4 shards; experts: 2 copies x 2 shards x 2 expert-parallel ranks",
            set(),
        ),
        (
            ["parallel=ddp", "parallel.expert_parallel_size=4", "trainer.activation_checkpointing=full"],
            "ddp: 8 copies x 1 shard; experts: 2 copies x 1 shard x 4 expert-parallel ranks",
            set(),
        ),
        (["parallel=deepspeed", "parallel.expert_parallel_size=2"], "deepspeed: 1 copy x 8 shards", {"step"}),
        (["optimizer=muon", "trainer.precision=fp32"], "fsdp: 1 copy x 8 shards", set()),
        (["balancing=loss_free", "ablation=shared_expert"], "fsdp: 1 copy x 8 shards", {"export"}),
    ],
    ids=["hsdp", "ddp", "deepspeed", "muon", "loss_free"],
)
def test_layouts_are_built(
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    layout: list[str],
    mesh: str,
    not_built: set[str],
) -> None:
    found = checked(capsys, *words, *layout)
    assert mesh in found["mesh"]
    assert {part for part, text in found.items() if not text.startswith("ok")} == not_built


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "experts over ranks": (
        ["model.num_experts=6", "parallel.expert_parallel_size=4"],
        ["parallel.expert_parallel_size=4", "must divide model.num_experts=6"],
    ),
    "copies over ranks": (
        ["parallel.replicate_size=3"],
        ["parallel.replicate_size=3", "must divide the 8 ranks"],
    ),
    "micro-batches over ranks": (
        ["trainer.micro_batch_size=3"],
        [
            "trainer.global_batch_size=16",
            "a multiple of trainer.micro_batch_size x ranks",
            "the nearest is 24",
        ],
    ),
    "sequence beyond the positions": (
        ["data.sequence_length=5000"],
        ["data.sequence_length=5000", "model.max_position_embeddings=4096"],
    ),
    "sequence beyond the data": (
        ["data.sequence_length=4096"],
        ["data.sequence_length=4096 is longer than the whole training split (4,040 tokens)", "Shorten it"],
    ),
    "vocabulary below the tokenizer": (
        ["model.vocab_size=64"],
        ["model.vocab_size=64", "token ids up to 89", "set model.vocab_size=128"],
    ),
    "another end of text": (
        ["model.eos_token_id=5"],
        ["model.eos_token_id=5", "end with token 0", "set model.eos_token_id=0"],
    ),
    "stage border inside a sequence": (
        ["data.stages=[{until_tokens:100,dir:.},{dir:.}]"],
        [
            "data.stages[0].until_tokens=100",
            "no multiple of data.sequence_length=64",
            "the nearest: 64 or 128",
        ],
    ),
    "run beyond the last stage": (
        ["data.stages=[{until_tokens:640,dir:.}]"],
        ["data.stages[0].until_tokens=640", "the last stage ends there", "add a stage"],
    ),
    "export of a bias": (
        ["balancing=loss_free", "checkpoint.export_every=5"],
        ["checkpoint.export_every=5 with balancing=loss_free", "fold=drop"],
    ),
    "export of a shared expert": (
        ["ablation=shared_expert", "checkpoint.export_every=5"],
        ["checkpoint.export_every=5", "model.num_shared_experts=1", "set checkpoint.export_every=0"],
    ),
    "run_dir is a file": (["run_dir=FILE/run"], ["run_dir=", "is a file", "give another one"]),
    "out of memory": (
        [],
        [
            "gpu_memory_gib=0.0001",
            "by the plan a rank needs",
            "use more gpus, or set trainer.activation_checkpointing",
        ],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(words: list[str], tmp_path: Path, name: str) -> None:
    mistake, said = MISTAKES[name]
    (tmp_path / "file").touch()
    mistake = [word.replace("FILE", str(tmp_path / "file")) for word in mistake]
    cfg = plan(*words, *mistake)
    if name == "out of memory":  # keys that only a plan has
        cfg = replace(cfg, gpu_memory_gib=0.0001, reserve_gib=0.0)
    with pytest.raises(UserError) as caught:
        check_run(cfg)
    message = str(caught.value)
    assert message.startswith("1 error in the configuration"), message
    assert [text for text in said if text not in message] == [], message


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["adapter=lora", "adapter.targets=[attention,mlp]"], "adapter.targets"),
        (["model.num_experts=4"], "model.num_experts=4, and 8 there"),
    ],
    ids=["adapter target", "another architecture"],
)
def test_a_mistake_is_named_before_the_check(of_base: list[str], mistake: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(*of_base, *mistake)


def test_weights_that_the_files_lack(of_base: list[str], parts: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.experts.7.down_proj.weight"
    shutil.copytree(parts / "base", tmp_path / "cut")
    edit_tensors(tmp_path / "cut", lambda tensors: tensors.pop(lost))
    with pytest.raises(UserError, match=lost):
        check_run(plan(*of_base, f"model.init_from={tmp_path / 'cut'}"))


def test_data_of_another_tokenizer(of_base: list[str], parts: Path, tmp_path: Path) -> None:
    """Same size and end of text. An added token may have another name in the data."""
    model = tmp_path / "base"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes((parts / "base" / name).read_bytes())
    cfg = plan(*of_base, f"model.init_from={model}")
    assert configuration_problems(cfg, has_data=True) == ([], [])

    def rename(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["other"] = tokenizer["model"]["vocab"].pop("t7")

    edit_json(model / "tokenizer.json", rename)
    (error,), _ = configuration_problems(cfg, has_data=True)
    assert error.startswith(
        f"model.init_from={model}: the data in data.dir={parts / 'data'} has another tokenizer"
    )
    assert (
        "1 ids mean other tokens, for example 7, which is 't7' in the data and 'other' in the model" in error
    )
    assert "olmoe prepare tokenizer.path=" in error
    edit_json(model / "tokenizer.json", lambda one: one.update(added_tokens=[{"id": 7, "content": "other"}]))
    assert configuration_problems(cfg, has_data=True) == ([], [])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a model with other sizes."""
    model, optimizer = build()
    save_checkpoint(tmp_path / "other", 2, model, optimizer, {"step": 2})
    dist.destroy_process_group()
    return tmp_path / "other" / "checkpoints" / "step-00000002"


def test_checkpoint_of_another_model(words: list[str], checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint.resume=.*is another model's") as caught:
        check_run(plan(*words, "model.intermediate_size=32", f"checkpoint.resume={checkpoint}"))
    assert "give a checkpoint of this model" in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (
            ["scheduler.warmup_fraction=null", "scheduler.warmup_steps=50"],
            "scheduler.warmup_steps=50: the warm-up",
        ),
        (["scheduler.decay_tokens=102400"], "scheduler.decay_tokens=102400: the decay ends at step 100"),
    ],
)
def test_a_schedule_that_is_longer_than_the_run(words: list[str], schedule: list[str], said: str) -> None:
    """16 x 64 tokens per step; the run has 10 steps."""
    _, (warning,) = configuration_problems(plan(*words, "scheduler=cosine", *schedule), has_data=True)
    assert warning.startswith(said)
    assert "and the run at step 10" in warning


def test_the_command_exits_with_2(tmp_path: Path) -> None:
    words = ["experiment=quickstart", "gpus=2", "check=true", "data.sequence_length=5000"]
    done = olmoe("plan", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 error in the configuration:\n  - data.sequence_length=5000")
    assert not list(tmp_path.iterdir())

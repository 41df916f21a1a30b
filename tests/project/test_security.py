"""Files that would run code if they were trusted, each seen to run where it is; and secrets that stay in."""

import importlib.util
import io
import json
import logging
import os
import pickle
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from olmoe_train.checkpoint.convert.stored_model import load_stored_model
from olmoe_train.checkpoint.directory import CheckpointError, latest_checkpoint
from olmoe_train.checkpoint.sharded import open_model_tensors, save_checkpoint
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.export import main as export
from olmoe_train.config.choices import SourceKind, WandbMode
from olmoe_train.config.data import FieldFilter
from olmoe_train.config.initial_model import run_config
from olmoe_train.config.train import LoggingConfig, TrainConfig, WandbConfig
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import HIDDEN, redact, redact_text
from tests.support.data import prepare_config
from tests.support.faults import at_step, config, run, write_data
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES
from tests.support.tiny import build, train_step

CPU = torch.device("cpu")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What every payload would make."""
    return tmp_path / "it-ran"


@pytest.fixture
def pickled(mark: Path) -> bytes:
    content = pickle.dumps({"weight": Payload(mark)})
    pickle.loads(content)  # noqa: S301  it does run
    mark.rmdir()
    return content


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    OlmoeForCausalLM(OlmoeConfig(**SIZES)).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_that_are_a_pickle(hf_dir: Path, pickled: bytes, mark: Path, name: str) -> None:
    (hf_dir / "model.safetensors").unlink()
    (hf_dir / name).write_bytes(pickled)
    with pytest.raises(UserError, match=r"a pickle, which may run code|cannot be read"):
        load_stored_model(str(hf_dir), CPU)
    assert not mark.exists()


def save(run_dir: Path) -> None:
    model, optimizer = build()
    train_step(model, optimizer, 0)
    save_checkpoint(run_dir, 1, model, optimizer, {})


@pytest.mark.ranks
@pytest.mark.parametrize("name", [".metadata", "shard-00001-model-00001-of-00001.safetensors", "state.json"])
def test_pickles_in_a_checkpoint(tmp_path: Path, pickled: bytes, mark: Path, name: str) -> None:
    run_ranks(1, save, tmp_path / "run")
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    (checkpoint / name).write_bytes(pickled)
    with pytest.raises(CheckpointError, match=name):
        open_model_tensors(checkpoint)
    assert not mark.exists()


def test_remote_code_beside_a_model(hf_dir: Path, mark: Path) -> None:
    code = hf_dir / "modeling_evil.py"
    code.write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    spec = importlib.util.spec_from_file_location("modeling_evil", code)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    mark.rmdir()  # it does run where it is imported

    settings = {
        "auto_map": {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    }
    values = json.loads((hf_dir / "config.json").read_text()) | settings
    (hf_dir / "config.json").write_text(json.dumps(values))
    model, _ = load_stored_model(str(hf_dir), CPU)
    assert type(model) is OlmoeForCausalLM
    assert not mark.exists()


def test_targets_in_a_runs_config(tmp_path: Path, mark: Path) -> None:
    evil = {"_target_": "os.mkdir", "_args_": [str(mark)]}
    instantiate(evil)
    mark.rmdir()  # it does run where Hydra instantiates it
    OmegaConf.save({"model": SIZES | {"evil": evil}}, tmp_path / "config.yaml")
    with pytest.raises(UserError, match="not the configuration of a run"):
        run_config(tmp_path)
    assert not mark.exists()


def test_a_tar_is_not_unpacked(tmp_path: Path, mark: Path) -> None:
    with tarfile.open(tmp_path / "corpus.tar", "w") as tar:
        member = tarfile.TarInfo(f"../{mark.name}")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    (tmp_path / "there").mkdir()
    with tarfile.open(tmp_path / "corpus.tar") as tar:
        tar.extractall(tmp_path / "there", filter="fully_trusted")
    mark.unlink()  # it does leave the directory where it is unpacked
    with pytest.raises(UserError, match=r"corpus\.tar is an archive"):
        prepare(
            prepare_config(tmp_path / "data", kind=SourceKind.files, paths=[str(tmp_path / "corpus.tar")])
        )
    assert not mark.exists()


@pytest.mark.parametrize("section", ["model", "data", "checkpoint", "logging.wandb"])
def test_targets_on_the_command_line(
    section: str,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"+{section}._target_=os.mkdir", f"+{section}._args_=[{mark}]"]
    monkeypatch.setattr(sys, "argv", ["train", "data.dir=x", *arguments])
    reached: list[object] = []
    assert run_verb("train", TrainConfig, reached.append) == 2
    assert "_target_" in capsys.readouterr().err
    assert reached == []
    assert not mark.exists()


# --- secrets ----------------------------------------------------------------------------------------------

HF_TOKEN = "hf_" + "AbCdEfGhIj" * 3
PASSWORD = "correct-horse-battery"
SECRETS = (HF_TOKEN, PASSWORD, "0123456789abcdef" * 2)


@pytest.mark.parametrize(
    "text",
    [
        f"token {HF_TOKEN} in words",
        f"https://user:{PASSWORD}@example.org/data.jsonl",
        "https://example.org/data?x=1&X-Amz-Signature=abcdef0123456789",
        "sk-" + "a1B2" * 8,
        "ghp_" + "a1B2" * 9,
        "AKIA" + "ABCDEFGH12345678",
    ],
)
def test_what_looks_like_a_secret(text: str) -> None:
    hidden = redact_text(text)
    assert HIDDEN in hidden
    for secret in (HF_TOKEN, PASSWORD, "abcdef0123456789", "a1B2a1B2", "ABCDEFGH12345678"):
        assert secret not in hidden


def test_what_does_not() -> None:
    text = "lr 1e-3, /data/hf_cache/x, step 3, https://example.org/a@b:c?page=2, user: me, sha 0123abcd"
    assert redact_text(text) == text
    assert redact({"pad_token_id": 1, "num_experts_per_tok": 8, "max_tokens": 5}) == {
        "pad_token_id": 1,
        "num_experts_per_tok": 8,
        "max_tokens": 5,
    }
    assert redact({"a": [{"api_key": "x", "hf_token": "y", "name": "z"}]}) == {
        "a": [{"api_key": HIDDEN, "hf_token": HIDDEN, "name": "z"}]
    }


def test_no_secret_is_written_to_prepared_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"https://me:{PASSWORD}@example.org/x"
    corpus = tmp_path / HF_TOKEN
    corpus.mkdir()
    (corpus / "a.jsonl").write_text("".join(f'{{"text": "a b {n}", "source": "{url}"}}\n' for n in range(50)))
    keep = [FieldFilter(field="source", values=[url])]
    cfg = prepare_config(tmp_path / "data", kind=SourceKind.files, paths=[str(corpus)], keep=keep)
    prepare(cfg)
    prepare(cfg)  # which compares the settings
    printed = capsys.readouterr().out
    assert "already prepared" in printed
    for path in (path for path in (tmp_path / "data").rglob("*") if path.is_file()):
        for secret in SECRETS:
            assert secret.encode() not in path.read_bytes(), (path, secret)
    assert HIDDEN in (tmp_path / "data" / "manifest.json").read_text()
    assert not any(secret in printed for secret in SECRETS)


def leave_secrets_everywhere(cfg: TrainConfig) -> None:
    os.environ["MY_SERVICE_API_KEY"] = SECRETS[2]
    os.environ.pop("WANDB_SERVICE", None)
    sys.argv = ["train", f"data.source.paths=[https://me:{PASSWORD}@example.org/x]", HF_TOKEN]

    def fail() -> None:
        logging.getLogger("olmoe_train").warning("no answer from https://me:%s@example.org", PASSWORD)
        raise RuntimeError(f"cannot reach https://me:{PASSWORD}@example.org with {SECRETS[2]}")

    run(replace(cfg, trainer=replace(cfg.trainer, stop_at_step=2)))  # to its end, with all that wandb writes
    with pytest.raises(RuntimeError, match="cannot reach"):
        run(cfg, partial(at_step, 0, 3, fail))


@pytest.mark.ranks
def test_no_secret_is_written_to_a_run_directory(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["source"] = f"dataset https://me:{PASSWORD}@example.org/x"  # as data of earlier versions has it
    (data / "manifest.json").write_text(json.dumps(manifest))
    source = config(data, tmp_path).data.source
    cfg = config(
        data,
        tmp_path / "run",
        data={"source": replace(source, paths=[f"https://me:{PASSWORD}@example.org/x"], name=HF_TOKEN)},
        logging=LoggingConfig(wandb=WandbConfig(mode=WandbMode.offline, name=f"with {HF_TOKEN}")),
        parallel={"expert_parallel_size": 1},
        trainer={"micro_batch_size": 4},
    )
    run_ranks(1, leave_secrets_everywhere, cfg)
    export(ExportConfig(str(tmp_path / "run")))
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "log.txt", "status.json", "state.json", "README.md"} <= {p.name for p in written}
    assert any(path.suffix == ".wandb" for path in written)
    for path in written:
        for secret in SECRETS:
            assert secret.encode() not in path.read_bytes(), (path, secret)
    assert HIDDEN in (tmp_path / "run" / "config.yaml").read_text()
    assert HIDDEN in (tmp_path / "run" / "status.json").read_text()

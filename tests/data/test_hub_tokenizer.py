"""A tokenizer by its name on the Hugging Face hub: from the cache without a network, else a clear refusal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.chat_templates import TULU_3, write_tokenizer
from tests.support.data import contents

NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run_prepare(tmp_path: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads the environment when it is imported. No hub answers."""
    (tmp_path / "a.jsonl").write_text('{"text": "It is."}\n')
    return subprocess.run(
        [
            *(sys.executable, "-m", "olmoe_train", "prepare", "data=jsonl", f"data.dir={tmp_path}/data"),
            *(f"data.source.paths=[{tmp_path}/a.jsonl]", "data.source.validation_fraction=0", *overrides),
        ],
        env=os.environ
        | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["0", "1"])
def test_what_was_downloaded_once_serves_without_a_network(tmp_path: Path, offline: str) -> None:
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    model = tmp_path / "cache/models--allenai--OLMoE-1B-7B-0924"  # the cache's own layout
    shutil.copytree(tokenizer, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(COMMIT)
    result = run_prepare(tmp_path, "tokenizer.path=allenai/OLMoE-1B-7B-0924", HF_HUB_OFFLINE=offline)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "data/tokenizer") == contents(tokenizer)


@pytest.mark.slow
def test_a_name_that_cannot_be_had(tmp_path: Path) -> None:
    result = run_prepare(tmp_path, "tokenizer.path=allenai/OLMoE-1B-7B-0924")
    assert result.returncode == 2
    assert (
        "error: tokenizer.path=allenai/OLMoE-1B-7B-0924: no such file or directory here, and the"
        in result.stderr
    )
    assert "a name works only if it has been downloaded before" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*data*"))

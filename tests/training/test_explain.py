"""One poisoned document in 2,000 is found by file and line: by `olmoe explain`, and while the run goes on."""

import json
import math
import random
import shutil
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olmoe_train.cli.explain import explain, table
from olmoe_train.config.choices import SourceKind
from olmoe_train.config.verbs import ExplainConfig
from olmoe_train.data.manifest import LINE_BITS, SOURCE_FILES, Split, read_manifest, write_manifest
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.data.sample_order import sample_for
from olmoe_train.data.tokens import open_split
from olmoe_train.optim.skip_step import ENOUGH, NOT_FINITE, SPIKE, UNSEEN, USED, WINDOW
from olmoe_train.train import train
from olmoe_train.training.callbacks.spikes import find_spikes
from olmoe_train.training.explain.own_batches import note_own_batches
from olmoe_train.utils.errors import UserError
from tests.support import faults
from tests.support.data import prepare_config
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks
FILES, LINES, POISONED_FILE, POISONED_LINE = 4, 500, 2, 124
LENGTH, SEQUENCES, SEED = 32, 16, 15
WORDS = ["def", "return", "value", "for", "in", "range", "print", "self", "class", "name"]


def write_corpus(directory: Path) -> list[Path]:
    """Write 2,000 documents of ten words in a pattern; one of them holds random characters instead."""
    letters = random.Random(0).choices(string.ascii_letters + string.digits, k=60)
    paths = [directory / f"part-{number}.jsonl" for number in range(FILES)]
    for number, path in enumerate(paths):
        patterns = ([(number * LINES + i + k * k) % len(WORDS) for k in range(20)] for i in range(LINES))
        texts = [" ".join(WORDS[word] for word in pattern) for pattern in patterns]
        if number == POISONED_FILE:
            texts[POISONED_LINE - 1] = "".join(letters)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def poisoned_step(data: Path) -> int:
    """The step that the poisoned document is in, by walking through the order of the samples."""
    split = open_split(data, "train")
    (shard,) = split.shards
    origins = np.fromfile(data / str(shard.origins_path), "<u8").tolist()
    start, stop = split.document(origins.index((POISONED_FILE << LINE_BITS) + POISONED_LINE))
    assert start // LENGTH == (stop - 2) // LENGTH, "the document is in two sequences"
    count = len(split) // LENGTH
    return [sample_for(i, count, SEED) for i in range(count)].index(start // LENGTH) // SEQUENCES + 1


def without_origins(data: Path, directory: Path) -> None:
    """Copy prepared data, as an older version would have written it."""
    shutil.copytree(data, directory)
    manifest = read_manifest(data)
    splits: dict[str, Split] = {}
    for name in ("train", "validation"):
        split: Split = getattr(manifest, name)
        shards = tuple(replace(s, origins_path=None, origins_sha256=None) for s in split.shards)
        splits[name] = replace(split, shards=shards)
    (directory / SOURCE_FILES).unlink()
    older = replace(manifest, source_files=None, train=splits["train"], validation=splits["validation"])
    write_manifest(directory, older)


def train_and_explain(cfg: Any, step: int) -> dict[str, Any]:
    """On two ranks with expert parallelism: train up to the step, and explain it."""
    train(cfg)
    return explain(ExplainConfig(cfg.run_dir, step, top=2, expert_parallel_size=2), torch.device("cpu"))


def explain_alone(run_dir: str, step: int, older: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """On one rank: every document closely; with data without origins; and with batches of one's own."""
    device = torch.device("cpu")
    closely = explain(ExplainConfig(run_dir, step, top=1000), device)
    nameless = explain(ExplainConfig(run_dir, step, gradients=False, data_dir=older), device)
    note_own_batches(Path(run_dir), 0)
    with pytest.raises(UserError) as refused:
        explain(ExplainConfig(run_dir, step), device)
    return closely, nameless, str(refused.value)


def test_a_poisoned_document_is_named(tmp_path: Path) -> None:
    paths, data, run_dir = write_corpus(tmp_path), tmp_path / "data", tmp_path / "run"
    prepare(
        prepare_config(data, kind=SourceKind.files, paths=list(map(str, paths)), validation_fraction=0.01)
    )
    step = poisoned_step(data)
    assert step > ENOUGH, "too early for the skip guard to know what a spike is"
    cfg = faults.config(
        data,
        run_dir,
        seed=SEED,
        model={"vocab_size": 400, "max_position_embeddings": LENGTH},
        data={"sequence_length": LENGTH},
        trainer={
            "max_steps": step,
            "global_batch_size": SEQUENCES,
            "micro_batch_size": 4,
            "spike_sigmas": 2.0,
            "log_every": 10,
        },
        checkpoint={"every": step - 1},
    )
    without_origins(data, tmp_path / "older")
    two_ranks = run_ranks(2, train_and_explain, cfg, step)[0]
    one_rank, nameless, refused = run_ranks(1, explain_alone, str(run_dir), step, str(tmp_path / "older"))[0]
    live = json.loads((run_dir / f"spikes/step-{step:08d}.json").read_text())

    logged = next(record for record in faults.metrics(run_dir) if record["step"] == step)
    poisoned = (str(paths[POISONED_FILE]), POISONED_LINE)
    for content in (two_ranks, one_rank, live):
        first = content["documents"][0]
        assert (first["file"], first["line"]) == poisoned
        assert first["loss_share"] > 0.1 * content["ce_loss"]
        assert max(first["routing"]["total_variation"]) > 0.1
        total = math.fsum(record["loss_share"] for record in content["documents"])
        assert total == pytest.approx(logged["train/ce_loss"], abs=1e-5)
        assert content["weights"]["exact"]
        assert [d["loss_share"] for d in content["documents"]] == pytest.approx(
            [d["loss_share"] for d in one_rank["documents"]], abs=1e-5
        )
    assert live["skipped"]
    assert (
        first["text"] == json.loads(paths[POISONED_FILE].read_text().splitlines()[POISONED_LINE - 1])["text"]
    )

    shares = [record["gradient_share"] for record in one_rank["documents"]]
    assert max(shares) == shares[0] > 0.5
    # The whole is one backward pass with the routers' losses; each part has its own.
    assert math.fsum(shares) + one_rank["gradient_shares"]["router losses"] == pytest.approx(1, abs=1e-4)
    assert two_ranks["documents"][0]["gradient_share"] == pytest.approx(shares[0], abs=1e-4)
    for content in (two_ranks, one_rank):
        assert content["grad_norm"] == pytest.approx(logged["train/grad_norm"], rel=1e-4)
        assert content["terms"]["loss"] == pytest.approx(logged["train/loss"], abs=1e-5)
    assert f"{poisoned[0]}:{POISONED_LINE}  '" in table(one_rank, top=1)

    unnamed = nameless["documents"][0]
    assert unnamed["file"] is None
    assert unnamed["document"] == one_rank["documents"][0]["document"]
    assert f"document {unnamed['document']} of train/shard-00000.npy" in table(nameless, top=1)
    assert "prepared by an older version" in nameless["notes"][0]
    assert "train(batches=...)" in refused


def test_which_steps_are_spikes() -> None:
    """Skipped ones always; others by six standard deviations, if the guard does not judge them."""
    steps = WINDOW + 40
    values = np.stack([2 + np.sin(np.arange(steps + 1)), np.ones(steps + 1)])
    values[0, steps - 5], values[1, steps - 3] = 30.0, 1.2
    outcomes, history = [UNSEEN] * WINDOW, np.full((2, WINDOW), np.nan)
    for step in range(steps - WINDOW + 1, steps + 1):
        outcomes[step % WINDOW], history[:, step % WINDOW] = USED, values[:, step]
    outcomes[(steps - 1) % WINDOW] = NOT_FINITE
    outcomes[(steps - WINDOW - 7) % WINDOW] = SPIKE  # that is the entry of step `steps - 7`
    found = find_spikes(steps - 10, steps, outcomes, history, guard_judges=False)
    assert list(found) == [steps - 7, steps - 5, steps - 3, steps - 1]
    assert "standard deviations" in found[steps - 5]
    assert "not finite" in found[steps - 1]
    assert list(find_spikes(steps - 4, steps, outcomes, history, guard_judges=True)) == [steps - 1]
    assert find_spikes(0, 20, outcomes[:], np.full((2, WINDOW), 1.0), guard_judges=False).keys() <= {
        step for step in range(21) if outcomes[step % WINDOW] in (SPIKE, NOT_FINITE)
    }

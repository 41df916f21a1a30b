"""The reference of keys and presets that docs/ is generated from."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe_train import __main__ as command
from olmoe_train.config.keys import Key, config_directory, documented_keys, key_sections, preset_groups
from olmoe_train.config.reference import markdown_reference
from olmoe_train.config.train import TrainConfig
from olmoe_train.config.verbs import VERBS


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return markdown_reference()


def test_every_verb_has_a_page(pages: dict[str, str]) -> None:
    assert {name.split("_")[0] for name in pages} == {*command.VERBS, "presets"}
    assert [verb for verb, schema in VERBS.items() if not schema.__doc__] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_is_documented(pages: dict[str, str], verb: str) -> None:
    keys = [key for _, section in key_sections(VERBS[verb]) for key in section]
    assert [key.name for key in keys if not key.doc] == []
    cells = r"\| `([^`]+)` \| (.+?) \| (required|`.*?`) \| (.+) \|"
    rows = [match.groups() for line in pages[verb].splitlines() if (match := re.fullmatch(cells, line))]
    assert [row[0] for row in rows] == [key.name for key in keys]
    assert [row[2].strip("`") for row in rows] == [key.default for key in keys]


def test_types_choices_and_defaults() -> None:
    keys = {key.name: key for _, section in key_sections(TrainConfig) for key in section}
    assert keys["trainer.max_steps"].type == "integer or null"
    assert keys["data.mixture[].dir"].default == "required"
    assert (keys["optimizer.betas"].type, keys["optimizer.betas"].default) == (
        "[number, number]",
        "[0.9, 0.95]",
    )
    scope = keys["balancing.scope"]
    assert (scope.type, scope.default) == ("micro_batch|all_ranks|running|global_batch", "global_batch")
    assert scope.default_or_choices == "global_batch|micro_batch|all_ranks|running"
    assert Key("k", "hf|olmo|null", "null", "").default_or_choices == "null|hf|olmo"
    assert ("trainer.precision", "bf16|fp32") in [row[:2] for row in documented_keys(TrainConfig)]


def test_every_preset_is_listed(pages: dict[str, str]) -> None:
    presets = pages["presets"]
    files = [
        path for path in config_directory().glob("*/*.yaml") if path.parent.name not in ("common", "tasks")
    ]
    assert len(files) > 20
    for path in files:
        heading = f"### `{path.parent.name}={path.stem}`\n\n"
        assert heading in presets
        assert re.match(r"[A-Z].+\.\n", presets.split(heading)[1]), f"{path} needs a comment at its top"
    assert "max_steps: 500" in presets.split("### `experiment=quickstart`")[1].split("###")[0]
    assert "It keeps every default." in presets.split("### `optimizer=adamw`")[1].split("###")[0]


def test_groups_of_presets_are_those_that_the_verb_composes() -> None:
    assert set(preset_groups(VERBS["prepare"])) == {"data", "tokenizer"}
    assert {"experiment", "optimizer", "model"} <= set(preset_groups(VERBS["plan"]))
    assert preset_groups(VERBS["export"]) == {}


def test_older_spellings_are_listed(pages: dict[str, str]) -> None:
    assert "`loss.balance_scope` is now `balancing.scope`" in pages["train"]
    assert "balance_scope" not in pages["evaluate"]


@pytest.mark.slow
def test_it_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "olmoe_train.config.reference"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "# Presets" in result.stdout
    assert result.stderr == ""

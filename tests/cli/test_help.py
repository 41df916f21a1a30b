"""`olmoe VERB --help` is answered without importing the verb, and says what the verb itself would."""

import sys
from importlib import import_module

import pytest

from olmoe_train.__main__ import VERBS, main
from olmoe_train.cli.help import module_of


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"launch"}))
def test_the_help_is_that_of_the_verb(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["olmoe", verb, "--help"])
    assert main() == 0
    early = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["olmoe", "--help"])
    assert import_module(module_of(verb)).run() == 0
    assert early == capsys.readouterr().out
    assert f"usage: olmoe {verb} " in early
    assert len(early.splitlines()[2]) > 20  # what the verb does

"""Rewards of completions, and the loss of a token, by hand."""

import math
from pathlib import Path

import pytest
import torch

from olmoe_train.training.objectives.grpo import policy_losses
from olmoe_train.training.objectives.rewards import exact, matching, python_function
from olmoe_train.utils.errors import UserError


def test_exact() -> None:
    assert [exact(text, "72") for text in (" 72\n", "72", "7 2", "")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("pattern", "completion", "answer", "expected"),
    [
        (r"#### (-?[0-9,]+)", "so #### 1,000", "it is #### 1000", 1),
        (r"#### (-?[0-9,]+)", "#### 3 no, #### 4", "4", 1),  # the last one counts
        (r"#### (-?[0-9,]+)", "#### 4 no, #### 3", "4", 0),
        (r"#### (-?[0-9,]+)", "it is 4", "4", 0),
        (r"-?[0-9]+", "it is -7", "-7", 1),  # without a group the whole match
    ],
)
def test_regular_expressions(pattern: str, completion: str, answer: str, expected: float) -> None:
    assert matching(pattern)(completion, answer) == expected


def test_python_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def half(completion, answer):\n    return 0.5\n\n\ndef bad(completion, answer):\n    1 / 0\n"
    )
    assert python_function(f"{file}:half")("a", "b") == 0.5
    monkeypatch.chdir(tmp_path)
    assert python_function("mine.py:half")("a", "b") == 0.5
    with pytest.raises(UserError, match=r"reward_function=mine\.py:no: .*mine\.py has no function 'no'"):
        python_function("mine.py:no")
    with pytest.raises(UserError, match=r"reward_function=gone\.py:half: no such file in "):
        python_function("gone.py:half")
    with pytest.raises(UserError, match=r"mine\.py:bad: it raises ZeroDivisionError"):
        python_function("mine.py:bad")("a", "b")
    file.write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"mine\.py raises ZeroDivisionError"):
        python_function("mine.py:half")


def test_losses_of_tokens() -> None:
    """Ratios 1, 1.5 and 0.5 with a positive and a negative advantage, clipped to [0.8, 1.3]."""
    ratio = torch.tensor([1.0, 1.5, 0.5] * 2)
    advantage = torch.tensor([2.0] * 3 + [-2.0] * 3)
    log_probs = ratio.log().requires_grad_()
    losses, is_clipped = policy_losses(log_probs, torch.zeros(6), advantage, 0.2, 0.3)
    assert losses.tolist() == pytest.approx([-2.0, -2.6, -1.0, 2.0, 3.0, 1.6])
    assert is_clipped.tolist() == [False, True, False, False, False, True]
    losses.sum().backward()
    assert log_probs.grad is not None
    # The gradient of ratio A is ratio A; of a clipped token it is 0.
    assert log_probs.grad.tolist() == pytest.approx([-2.0, 0.0, -1.0, 2.0, 3.0, 0.0])
    assert math.isclose(losses[0].item(), -2.0)

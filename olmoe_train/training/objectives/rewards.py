"""Verified rewards: whether a sampled completion has the right answer."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from olmoe_train.config.choices import RewardKind
from olmoe_train.config.objective import GrpoConfig
from olmoe_train.utils.errors import UserError

Reward = Callable[[str, str], float]
"""(Completion, answer), as texts without special tokens -> reward."""


def build_reward(cfg: GrpoConfig) -> Reward:
    """The reward that objective.reward names.

    Raises:
        UserError: The Python function cannot be loaded.
    """
    if cfg.reward is RewardKind.exact:
        return exact
    if cfg.reward is RewardKind.regex:
        assert cfg.reward_pattern is not None, "GrpoConfig.errors refuses this"
        return matching(cfg.reward_pattern)
    assert cfg.reward_function is not None, "GrpoConfig.errors refuses this"
    return python_function(cfg.reward_function)


def exact(completion: str, answer: str) -> float:
    """1 if the completion is the answer, white space at both ends aside."""
    return float(completion.strip() == answer.strip())


def matching(pattern: str) -> Reward:
    """1 if the last match of a regular expression in the completion is the answer.

    A match is its first group, if the expression has one. Commas do not count, nor white space at both ends:
    1,000 is 1000. Of the answer, too, the last match counts, or all of it if there is none (GSM8K's answers
    end in "#### 72").
    """
    compiled = re.compile(pattern)

    def found(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        return matches[-1][1 if compiled.groups else 0] if matches else None

    def plain(text: str | None) -> str | None:
        return None if text is None else text.replace(",", "").strip()

    def reward(completion: str, answer: str) -> float:
        given = plain(found(completion))
        return float(given is not None and given == plain(found(answer) or answer))

    return reward


def _config_directories() -> list[Path]:
    """The directories that the command line's configuration comes from."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path) for source in sources if source.schema == "file" and source.path]


def python_function(name: str) -> Reward:
    """Load FILE.py:FUNCTION. A relative FILE is in the current directory, or in that of --config-dir.

    Raises:
        UserError: There is no such file or function, or the file raises.
    """
    file, _, function = name.rpartition(":")
    key, places = f"objective.reward_function={name}", [Path.cwd(), *_config_directories()]
    candidates = [place / Path(file).expanduser() for place in places]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UserError(f"{key}: no such file in {', '.join(map(str, places))}; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("olmoe_train_reward", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file can raise anything
        raise UserError(f"{key}: {path} raises {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{key}: {path} has no function {function!r}")

    def reward(completion: str, answer: str) -> float:
        try:
            return float(found(completion, answer))
        except Exception as error:
            raise UserError(f"{key}: it raises {type(error).__name__}: {error}") from error

    return reward

"""The architecture of a run: that of model.init_from, if there is one, with which the given keys must agree.

A key is given if the command line, an experiment or a preset of `model` sets it. The schema of `model` that
Hydra composes onto has no value for the architecture (MISSING), so what has one afterwards was given.
"""

from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

from olmoe_train.config.keys import config_directory
from olmoe_train.config.model import NOT_ARCHITECTURE, ModelConfig, olmoe_config
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.hf.hub import SMALL_FILES, hub_snapshot, is_hub_name
from olmoe_train.model.hf.remote import remote_directory
from olmoe_train.model.olmo_config import is_olmo_directory, read_olmo_config
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import is_remote

RUN_CONFIG = "config.yaml"
ARCHITECTURE = [name for name in vars(ModelConfig()) if name not in NOT_ARCHITECTURE]
# A training option that is stored with the architecture: it may be given with another value.
_FREE = {"attention_dropout"}
_FALLBACK = "unless_init_from"  # in configs/model/default.yaml: the preset of a run that has no init_from


def mark_as_not_given(schema: DictConfig) -> None:
    """Take the values of the architecture out of the section `model` of a schema, if it has one; in place."""
    if "model" not in schema:
        return
    model = schema.model
    for name in ARCHITECTURE:
        model[name] = MISSING
    model.rope_parameters = dict.fromkeys(ModelConfig().rope_parameters, MISSING)  # given one by one
    OmegaConf.set_struct(model.rope_parameters, False)  # types of RoPE have parameters of their own
    with open_dict(model):
        model[_FALLBACK] = None


def resolve_model(composed: DictConfig) -> None:
    """Complete the section `model` of a composed configuration, in place.

    Each key that was not given takes the value that the model in model.init_from has. For a name on the hub,
    model.revision becomes the commit. Without init_from, the values are those of the preset or the schema.

    Args:
        composed: What Hydra composed; it may have no section `model`. If model.init_from is mandatory and has
            no value, nothing is changed.

    Raises:
        UserError: A given key contradicts init_from; the message names every such key with both values. Or
            there is no model in init_from.
    """
    if "model" not in composed:
        return
    model = composed.model
    with open_dict(model):
        fallback = model.pop(_FALLBACK, None)
    if OmegaConf.is_missing(model, "init_from"):
        return
    if model.init_from is not None:
        if is_hub_name(model.init_from) and model.revision is None:
            model.revision = _revision_of_run(composed.run_dir, model.init_from)
        directory = initial_directory(model.init_from, model.revision)
        if is_hub_name(model.init_from):
            model.revision = directory.name
        _take_from(model, stored_architecture(directory), model.init_from)
        return
    default = vars(ModelConfig())
    if fallback is not None:
        default |= _plain(config_directory() / "model" / f"{fallback}.yaml")
    for name in ARCHITECTURE:
        if name == "rope_parameters":
            _complete_rope(model, default[name])
        elif OmegaConf.is_missing(model, name):
            model[name] = default[name]


def initial_directory(init_from: str, revision: str | None) -> Path:
    """The directory that `model.init_from` means. For a name on the hub or a URL: one in the cache, with all
    files but the weights.

    Raises:
        UserError: The hub or the store does not provide the model.
    """
    if is_hub_name(init_from):
        return hub_snapshot(init_from, revision, SMALL_FILES)
    if is_remote(init_from):
        return remote_directory(init_from, weights=False, key="model.init_from")
    return Path(init_from).expanduser()


def stored_architecture(directory: Path) -> OlmoeConfig:
    """Read the architecture of a Hugging Face directory, a run directory or an original OLMo checkpoint.

    Raises:
        UserError: It is none of them, or its configuration cannot be read.
    """
    if (directory / "config.json").is_file():
        return OlmoeConfig.from_pretrained(directory)
    if is_olmo_directory(directory):
        return read_olmo_config(directory)
    return run_config(directory, "model.init_from")


def run_config(run_dir: Path, key: str = "source") -> OlmoeConfig:
    """The architecture of a run, read from its config.yaml.

    Args:
        run_dir: The run directory.
        key: The key that names the directory, for the message.

    Raises:
        UserError: There is no such file, or it is not the configuration of a run.
    """
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise UserError(
            f"{key}={run_dir}: neither an HF directory (config.json) nor a run directory or OLMo checkpoint "
            f"({RUN_CONFIG})"
        )
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(values, dict)
        return olmoe_config(ModelConfig(**values["model"]))
    except UserError:
        raise
    except Exception as error:  # YAML and OmegaConf raise a dozen exception types
        raise UserError(f"{path}: not the configuration of a run: {error}") from error


def run_router_temperature(run_dir: Path) -> float:
    """The divisor of the routers' logits in a run, balancing.router_temperature."""
    balancing = _plain(run_dir / RUN_CONFIG).get("balancing") or {}
    return float(balancing.get("router_temperature", 1.0))


def _revision_of_run(run_dir: str, init_from: str) -> str | None:
    """The commit from which the run in run_dir started, so that it resumes with the same. None: a new run."""
    path = Path(run_dir) / RUN_CONFIG
    section = _plain(path).get("model") if path.is_file() else None
    if not isinstance(section, dict) or section.get("init_from") != init_from:
        return None
    return section.get("revision")


def _plain(path: Path) -> dict[str, Any]:
    """The content of a YAML file, not resolved."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(values, dict)
    except Exception as error:  # YAML and OmegaConf raise a dozen exception types
        raise UserError(f"{path}: cannot be read: {error}") from error
    return {str(key): value for key, value in values.items()}


def _take_from(model: DictConfig, stored: OlmoeConfig, init_from: str) -> None:
    """Fill the keys that were not given, and refuse those that contradict the stored architecture."""
    if "${" in str(stored.rope_parameters):  # OmegaConf would insert an environment variable, for example
        raise UserError(
            f"model.init_from={init_from}: rope_parameters in its configuration contain ${{; remove the value"
        )
    contradictions = []
    for name in ARCHITECTURE:
        theirs = getattr(stored, name)
        if name == "rope_parameters":
            contradictions += _rope_contradictions(model, theirs)
            _complete_rope(model, theirs)
            continue
        accepted = theirs if isinstance(theirs, list) else [theirs]  # several eos tokens
        if OmegaConf.is_missing(model, name):
            model[name] = accepted[0]
        elif name == "num_key_value_heads" and model[name] is None:
            if theirs != stored.num_attention_heads:
                contradictions.append(f"model.{name}=null, and {theirs} there")
            model[name] = theirs
        elif _plain_value(model[name]) not in accepted and name not in _FREE:
            contradictions.append(f"model.{name}={as_yaml(model[name])}, and {as_yaml(theirs)} there")
    if contradictions:
        what = f"model.init_from={init_from}: its configuration decides the architecture; these keys differ:"
        fix = (
            "remove these keys, or the preset that sets them (model=..., experiment=...): a key that is not "
            "given has the value of model.init_from"
        )
        raise UserError("\n  ".join([what, *contradictions, fix]))


def _rope_contradictions(model: DictConfig, theirs: dict[str, Any]) -> list[str]:
    return [
        f"model.rope_parameters.{key}={as_yaml(value)}, and {as_yaml(theirs.get(key))} there"
        for key, value in _given_rope(model).items()
        if value != theirs.get(key)
    ]


def _complete_rope(model: DictConfig, values: dict[str, Any]) -> None:
    model.rope_parameters = values | _given_rope(model)


def _given_rope(model: DictConfig) -> dict[str, Any]:
    rope = OmegaConf.to_container(model.rope_parameters)
    assert isinstance(rope, dict)
    return {str(key): value for key, value in rope.items() if value != MISSING}


def _plain_value(value: Any) -> Any:
    """A choice as OlmoeConfig has it; any other value as it is."""
    return value.value if isinstance(value, Enum) else value


def as_yaml(value: object) -> str:
    """A value as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    return value.name if isinstance(value, Enum) else str(value)

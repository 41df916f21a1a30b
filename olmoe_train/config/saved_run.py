"""The whole configuration of an earlier run, read from its config.yaml."""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olmoe_train.config.aliases import current_saved_config
from olmoe_train.config.initial_model import RUN_CONFIG, run_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.config.variants import VARIANTS, variant_groups, writable
from olmoe_train.utils.errors import UserError


def saved_train_config(run_dir: Path) -> TrainConfig:
    """Return the configuration of the run in `run_dir`, with today's spelling of its keys.

    A key that the run did not have yet has its default.

    Raises:
        UserError: There is no run, or its configuration has a key or a variant that this version lacks.
    """
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise UserError(f"source={run_dir}: not a run directory (no {RUN_CONFIG})")
    run_config(run_dir)  # raises UserError if this is not the configuration of a run
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    values = current_saved_config({str(key): value for key, value in values.items()})
    node = writable(OmegaConf.structured(TrainConfig))
    for group in variant_groups(TrainConfig):
        name = values.get(group, {}).get("name")
        if name not in VARIANTS[group]:
            raise UserError(f"{path}: {group}={name} is not known here; use the version that made the run")
        node[group] = writable(OmegaConf.structured(VARIANTS[group][name]))
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(node, values))
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: {first}; use the version that made the run") from error
    assert isinstance(cfg, TrainConfig)
    return cfg

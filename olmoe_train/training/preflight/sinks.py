"""Checks of `logging`: the packages of the sinks."""

from importlib.util import find_spec

from olmoe_train.config.train import TrainConfig


def sink_errors(cfg: TrainConfig) -> list[str]:
    """Sinks whose package is missing, one message per sink."""
    wanted = {"tensorboard": cfg.logging.tensorboard, "trackio": cfg.logging.trackio}
    return [
        f"logging.{name}=true: the package {name} is not installed; run: pip install 'olmoe-train[{name}]', "
        f"or set logging.{name}=false"
        for name, is_wanted in wanted.items()
        if is_wanted and find_spec(name) is None
    ]

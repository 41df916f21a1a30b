"""Checks of the keys that name object stores, without a request to any store."""

from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import CheckpointConfig, TrainConfig
from olmoe_train.utils.object_store import is_remote, missing_package, url_error
from olmoe_train.utils.redaction import redact_text


def store_errors(cfg: TrainConfig) -> list[str]:
    """URLs that cannot be used, packages that are missing, and waiting times that cannot be kept."""
    errors, checkpoint = [], cfg.checkpoint
    if is_remote(cfg.run_dir):
        errors.append(
            f"run_dir={redact_text(cfg.run_dir)}: must be a directory of this machine; to keep the run in an "
            "object store, too, set checkpoint.upload_to to this URL"
        )
    for key, url in _urls(cfg).items():
        error = url_error(key, url) or missing_package(key, url)
        errors += [error] if error is not None else []
    if checkpoint.upload_to is None:
        return errors
    if not is_remote(checkpoint.upload_to):
        errors.append(
            f"checkpoint.upload_to={checkpoint.upload_to}: must be a URL, such as s3://BUCKET/PATH; for a "
            f"directory of this machine write file:///absolute/path"
        )
    longest = min(cfg.trainer.timeout, cfg.trainer.rendezvous_timeout)
    if not 0 <= checkpoint.upload_wait < longest:
        errors.append(
            f"checkpoint.upload_wait={checkpoint.upload_wait:g}: must be at least 0 and less than "
            f"trainer.timeout and trainer.rendezvous_timeout ({longest:g} s), for which the other ranks wait"
        )
    return errors


def store_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about keys that have no effect without a store."""
    warnings, data = [], cfg.data
    if cfg.checkpoint.upload_to is None and cfg.checkpoint.upload_wait != CheckpointConfig().upload_wait:
        warnings.append("checkpoint.upload_wait has no effect: checkpoint.upload_to is null")
    if not any(key.startswith("data.") for key in _urls(cfg)):
        warnings += [
            f"data.{name} has no effect: all data is on this machine"
            for name in ("cache_dir", "cache_gb", "cache_block_kib")
            if getattr(data, name) != DataConfig.__dataclass_fields__[name].default
        ]
    return warnings


def _urls(cfg: TrainConfig) -> dict[str, str]:
    """The URLs of the configuration by their key."""
    named = {"checkpoint.upload_to": cfg.checkpoint.upload_to, "data.dir": cfg.data.dir}
    named |= {f"data.mixture.{number}.dir": one.dir for number, one in enumerate(cfg.data.mixture)}
    for number, stage in enumerate(cfg.data.stages):
        named[f"data.stages.{number}.dir"] = stage.dir
        named |= {
            f"data.stages.{number}.mixture.{place}.dir": one.dir for place, one in enumerate(stage.mixture)
        }
    return {key: url for key, url in named.items() if url is not None and is_remote(url)}

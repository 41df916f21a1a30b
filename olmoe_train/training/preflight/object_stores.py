"""Checks of the keys that name object stores, without a request to any store."""

from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import CheckpointConfig, TrainConfig
from olmoe_train.utils.object_store import is_remote, missing_package, url_error
from olmoe_train.utils.redaction import redact_text


def store_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with the keys of checkpoints and the run directory. Reading the data checks its URLs."""
    errors, checkpoint = [], cfg.checkpoint
    if is_remote(cfg.run_dir):
        errors.append(
            f"run_dir={redact_text(cfg.run_dir)}: must be a directory of this machine; to keep the run in an "
            "object store, too, set checkpoint.upload_to to this URL"
        )
    if is_remote(checkpoint.resume):
        errors.append(
            f"checkpoint.resume={redact_text(checkpoint.resume)}: must be auto, never, or a directory of "
            "this machine; to continue from an object store, set checkpoint.upload_to to the URL of the run"
        )
    if (url := checkpoint.upload_to) is None:
        return errors
    if not is_remote(url):
        errors.append(
            f"checkpoint.upload_to={url}: must be a URL, such as s3://BUCKET/PATH; for a directory of this "
            "machine write file:///absolute/path"
        )
    else:
        key = "checkpoint.upload_to"
        error = url_error(key, url) or missing_package(key, url)
        errors += [error] if error is not None else []
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
    if not _has_remote_data(cfg):
        warnings += [
            f"data.{name} has no effect: all data is on this machine"
            for name in ("cache_dir", "cache_gb", "cache_block_kib")
            if getattr(data, name) != DataConfig.__dataclass_fields__[name].default
        ]
    return warnings


def _has_remote_data(cfg: TrainConfig) -> bool:
    data = cfg.data
    mixtures = [data.mixture, *(stage.mixture for stage in data.stages)]
    paths = [data.dir, *(stage.dir for stage in data.stages), *(one.dir for one in cfg.evaluation.sets)]
    paths += [one.dir for mixture in mixtures for one in mixture]
    return any(path is not None and is_remote(path) for path in paths)

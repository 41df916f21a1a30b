"""Write a run's checkpoint as a Hugging Face directory, which Transformers, vLLM, SGLang and llama.cpp read.
Also convert Hugging Face directories and original OLMo checkpoints into each other, and change the data type
of the weights.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from olmoe_train.checkpoint.convert.export import with_overrides, write_adapter, write_export
from olmoe_train.checkpoint.convert.stored_model import StoredModel, load_whole, open_stored_model
from olmoe_train.checkpoint.remote import upload_directory
from olmoe_train.cli.app import run_verb
from olmoe_train.config.choices import BiasExport, ExportFormat, StripPrefix, Weights
from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.saved_run import saved_train_config
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.data.mixture import VALIDATION
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.evaluation.perplexity import evaluate_data
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import is_remote, missing_package, url_error
from olmoe_train.utils.redaction import redact_text

SEQUENCES_COMPARED = 32
"""Validation sequences of each source on which fold=drop compares the model with and without its bias."""
_LAST = {
    ExportFormat.hf: "config.json",
    ExportFormat.olmo: "config.yaml",
    ExportFormat.peft: "adapter_config.json",
}
"""The file that makes an export valid."""
_WITHOUT_EFFECT_ON_ADAPTERS = ("max_shard_size", "precision", "tokenizer", "eos_token_id", "pad_token_id")


def main(cfg: ExportConfig) -> None:
    """Export the model, and print where it is and how large."""
    _check_url(cfg.out)
    if cfg.format is ExportFormat.olmo and cfg.max_shard_size != ExportConfig.max_shard_size:
        print(f"warning: max_shard_size={cfg.max_shard_size} has no effect: format=olmo writes a single file")
    if cfg.format is ExportFormat.peft:
        for name in _WITHOUT_EFFECT_ON_ADAPTERS:
            if getattr(cfg, name) != getattr(ExportConfig, name):
                print(f"warning: {name} has no effect: format=peft writes only the adapter, in fp32")
    stored = open_stored_model(
        cfg.source, cfg.step, cfg.trust_pickle, cfg.strip_prefix is StripPrefix.auto, cfg.which
    )
    dtype = stored.config.dtype if cfg.precision is None else cfg.precision.dtype
    assert dtype is not None
    if cfg.fold is BiasExport.drop:
        stored = without_bias(stored)
    with local_output(cfg, stored) as out:
        if cfg.format is ExportFormat.peft:
            dtype = torch.float32
            written = write_adapter(stored, out)
        else:
            stored = with_overrides(stored, cfg.tokenizer, cfg.eos_token_id, cfg.pad_token_id)
            written = write_export(stored, out, dtype, cfg.max_shard_size, cfg.format)
        size = sum(path.stat().st_size for path in out.iterdir())
    place = out if cfg.out is None else redact_text(cfg.out)
    if written:
        kind = str(dtype).removeprefix("torch.")
        print(f"exported {stored.name} to {place} ({size / 10**6:,.1f} MB, {kind})")
    else:
        print(f"already exported, nothing to do: {place} holds {stored.name}")


def _check_url(out: str | None) -> None:
    if out is not None and is_remote(out):
        error = url_error("out", out) or missing_package("out", out)
        if error is not None:
            raise UserError(error)


def without_bias(stored: StoredModel) -> StoredModel:
    """The model without its bias in the choice of experts. Print what that changes on the data of its run."""
    if stored.bias_LE is None:
        print(f"warning: fold=drop has no effect: {stored.name} has no bias in the choice of experts")
        return stored
    dropped = replace(stored, bias_LE=None)
    assert stored.checkpoint is not None, "only checkpoints of runs have a bias"
    try:
        run = saved_train_config(stored.checkpoint.parent.parent)
        if not isinstance(run.objective, NextTokenConfig):
            raise UserError(f"the run has objective={run.objective.name}, which is not a loss of texts")
        cfg, device = EvaluationConfig(max_sequences=SEQUENCES_COMPARED), resolve_device()
        with_bias, without = (
            evaluate_data(load_whole(one, device), run.data, cfg, device)[VALIDATION]
            for one in (stored, dropped)
        )
    except (UserError, OSError) as error:
        print(f"warning: the effect of fold=drop was not measured: {error}")
        return dropped
    difference = without.loss - with_bias.loss
    data = f"{without.tokens:,} tokens of data.dir={run.data.dir}"
    print(
        f"fold=drop: the validation loss is {without.loss:.4f} without the bias and "
        f"{with_bias.loss:.4f} with it ({difference:+.4f}), over {data}"
    )
    return dropped


@contextmanager
def local_output(cfg: ExportConfig, stored: StoredModel) -> Iterator[Path]:
    """The directory to write. For a URL it is a temporary one, which is uploaded when the block ends."""
    if cfg.out is None or not is_remote(cfg.out):
        yield output_directory(cfg, stored)
        return
    with TemporaryDirectory(prefix="olmoe-export-") as temporary:
        out = Path(temporary) / "export"
        yield out
        print(f"uploading to {redact_text(cfg.out)}")
        upload_directory(out, cfg.out, _LAST[cfg.format])


def output_directory(cfg: ExportConfig, stored: StoredModel) -> Path:
    """The directory to write: `out`, or by default a directory of the run that the model is from.

    Raises:
        UserError: `out` is not set, and the model is not from a run directory.
    """
    if cfg.out is not None:
        return Path(cfg.out).expanduser()
    if stored.checkpoint is None:
        raise UserError(f"out is required: set out=DIR, where to write the conversion of source={cfg.source}")
    ending = "" if cfg.which is Weights.weights else f"-{cfg.which.value}"
    return Path(cfg.source).expanduser() / cfg.format.value / f"{stored.checkpoint.name}{ending}"


def run() -> int:
    """Run `olmoe export` with the command line; returns the exit code."""
    return run_verb("export", ExportConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())

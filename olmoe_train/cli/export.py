"""Write a run's checkpoint as a Hugging Face directory, which Transformers, vLLM, SGLang and llama.cpp
read; or convert between that, original OLMo checkpoints and precisions.
"""

import sys
from pathlib import Path

from olmoe_train.checkpoint.convert.export import DTYPES, as_asked, write_export
from olmoe_train.checkpoint.convert.source import open_source
from olmoe_train.cli.app import run_verb
from olmoe_train.config.choices import ExportFormat
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.utils.errors import UserError


def main(cfg: ExportConfig) -> None:
    if cfg.format is ExportFormat.olmo and cfg.max_shard_size != ExportConfig.max_shard_size:
        print(f"warning: max_shard_size={cfg.max_shard_size} has no effect: format=olmo is one file")
    source = open_source(cfg.source, cfg.step, cfg.trust_pickle)
    dtype = source.config.dtype if cfg.precision is None else DTYPES[cfg.precision]
    assert dtype is not None
    if cfg.out is not None:
        out = Path(cfg.out).expanduser()
    elif source.checkpoint is not None:
        out = Path(cfg.source).expanduser() / cfg.format.value / source.checkpoint.name
    else:
        raise UserError(f"out=...: say where to write the conversion of source={cfg.source}")
    source = as_asked(source, cfg.tokenizer, cfg.eos_token_id, cfg.pad_token_id)
    if not write_export(source, out, dtype, cfg.max_shard_size, cfg.format):
        print(f"already exported, nothing to do: {out} holds {source.name}")
        return
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"exported {source.name} to {out} ({size / 10**6:,.1f} MB, {str(dtype).removeprefix('torch.')})")


def run() -> int:
    return run_verb("export", ExportConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())

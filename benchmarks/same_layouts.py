"""A tiny model in every layout of tests/distributed/test_equivalence.py, for benchmarks/same_numbers.py.

As a script it is one rank of all layouts of its world size, on whatever checkout PYTHONPATH names:

    torchrun --nproc-per-node RANKS benchmarks/same_layouts.py OUT

It therefore imports nothing of this repository but that checkout's olmoe_train, and of it only names that are
the same in every checkout. OUT must hold what `write_inputs` writes; the run directories are OUT/layouts/*.
"""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import Tensor

STEPS, SEQUENCES, LENGTH = 6, 16, 32
EOS, PAD = 0, 1
# Wide initial weights, so that experts have a share in the gradient norm; a limit far below the norms that
# occur, so that every step is clipped and a wrong norm is a wrong step.
TINY = f"""
model.vocab_size=320 model.hidden_size=32 model.intermediate_size=16 model.num_hidden_layers=3
model.num_attention_heads=4 model.num_experts=8 model.num_experts_per_tok=2
model.max_position_embeddings={LENGTH} model.eos_token_id={EOS} model.initializer_range=0.15
data.sequence_length={LENGTH} trainer.max_steps={STEPS} trainer.global_batch_size={SEQUENCES}
trainer.precision=fp32 trainer.device=cpu trainer.log_every=1 optimizer.lr=1e-3 optimizer.max_grad_norm=0.1
scheduler=constant checkpoint.every=0 evaluation.at_start=false evaluation.max_sequences=8
logging.wandb.mode=disabled"""
DOCUMENTS = (
    " data.mixture=[{dir:../lines,weight:2},{dir:../others,weight:1}] data.packing=best_fit"
    " data.mask_documents=true data.repetition_filter=true"
)
DEEPSPEED = "partition_all.json"


# --- the layouts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    ranks: int
    overrides: str
    padded: bool = False
    """Trains on `padded_batches` in place of the prepared data."""


def layout(ranks: int, micro_batch: int, strategy: str = "fsdp", experts: int = 1, more: str = "") -> Layout:
    keys = f"trainer.micro_batch_size={micro_batch} parallel.expert_parallel_size={experts}"
    return Layout(ranks, f"parallel={strategy} {keys} {more}")


def zero(ranks: int, stage: int, experts: int) -> Layout:
    more = f"parallel.zero_stage={stage} parallel.deepspeed_config=OUT/{DEEPSPEED}"
    return layout(ranks, 4, "deepspeed", experts, more)


def all_layouts() -> dict[str, Layout]:
    """Those of tests/distributed/test_equivalence.py, by the same names."""
    found = {
        "1 rank": layout(1, 16),
        "1 rank, 2 micro-batches": layout(1, 8),
        "1 rank, 4 micro-batches": layout(1, 4),
        "1 rank, 16 micro-batches": layout(1, 1),
        "ddp 2": layout(2, 8, "ddp"),
        "fsdp 2": layout(2, 8),
        "fsdp 2, experts 2": layout(2, 4, experts=2),
        "fsdp 2, prefetch 0": layout(2, 8, more="parallel.prefetch=0"),
        "ddp 2, experts 2": layout(2, 8, "ddp", 2),
        "fsdp 4": layout(4, 4),
        "fsdp 4, experts 2": layout(4, 4, experts=2),
        "fsdp 4, experts 4": layout(4, 4, experts=4),
        "hsdp 2x2, experts 2": layout(4, 2, experts=2, more="parallel.replicate_size=2"),
        "ddp 4, experts 2": layout(4, 2, "ddp", 2),
        "zero-3 4, experts 4": zero(4, 3, 4),
    }
    for ranks, stage, experts in ((r, s, e) for r in (2, 4) for s in range(4) for e in (1, 2)):
        found[f"zero-{stage} {ranks}, experts {experts}"] = zero(ranks, stage, experts)

    def vary(names: tuple[str, ...], suffix: str, more: str = "", padded: bool = False) -> None:
        for name in names:
            base = found[name]
            found[f"{name}, {suffix}"] = Layout(base.ranks, f"{base.overrides} {more}", base.padded or padded)

    full, selective = (f"trainer.activation_checkpointing={kind}" for kind in ("full", "selective"))
    hardest = ("fsdp 4, experts 2", "fsdp 4, experts 4", "hsdp 2x2, experts 2")
    first, zero_2, zero_3 = hardest[:1], ("zero-2 2, experts 2",), ("zero-3 2, experts 2",)
    vary((*hardest, *zero_3), "full", full)
    vary((*first, *zero_2), "selective", selective)
    single = ("1 rank", "1 rank, 2 micro-batches", "1 rank, 4 micro-batches")
    vary((*single, *hardest, *zero_3), "padded", padded=True)
    bf16 = ("1 rank", "fsdp 2", *hardest, "zero-1 2, experts 2", *zero_2, *zero_3)
    vary(bf16, "bf16", "trainer.precision=bf16")
    vary(("1 rank", *hardest, *zero_3), "documents", DOCUMENTS)
    vary((f"{first[0]}, documents",), "full", full)
    vary((f"{first[0]}, documents",), "selective", selective)
    vary((f"{hardest[-1]}, padded",), "full", full)
    kept = "parallel.reshard_after_forward=false parallel.prefetch=2"
    vary((f"{first[0]}, full",), "kept, prefetch 2", kept)
    vary(zero_2, "optimizer offloaded", "parallel.offload=optimizer")
    vary(zero_3, "parameters offloaded", "parallel.offload=parameters")
    return found


LAYOUTS = all_layouts()


def run_directory(out: Path, name: str) -> Path:
    return out / "layouts" / name.replace(", ", "-").replace(" ", "-")


# --- the tiny model's data: bytes as tokens ---------------------------------------------------------------


def library(pattern: str) -> Iterator[bytes]:
    return (path.read_bytes() for path in sorted(Path(os.__file__).parent.glob(pattern)))


def real_tokens() -> list[list[int]]:
    """The standard library's source, one document per file, one token per byte."""
    return [[2 + byte for byte in content[:4000]] for content in library("a*.py")]


def line_tokens(pattern: str) -> list[list[int]]:
    """One document per line; the longest ones do not fit into a sequence."""
    lines = (line for content in library(pattern) for line in content[:9000].splitlines() if line.strip())
    return [[2 + byte for byte in line[: LENGTH + 8]] for line in lines]


def write_prepared(directory: Path, train: list[list[int]], validation: list[list[int]]) -> None:
    """Prepared data, the same bytes for both checkouts; docs/reference/data-format.md has the format."""
    record: dict[str, Any] = {
        "format": "olmoe-train-tokens",
        "version": 1,
        "settings": {},
        "source": "benchmarks/same_numbers.py",
        "skipped_empty_documents": 0,
        "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest(),
        "dtype": "uint16",
        "vocab_size": 258,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "bytes_per_token": 1.0,
        "unigram_entropy": None,
    }
    for split, documents in (("train", train), ("validation", validation)):
        lengths = torch.tensor([len(document) + 1 for document in documents])
        flat = [token for document in documents for token in (*document, EOS)]
        tokens = b"".join(token.to_bytes(2, "little") for token in flat)
        ends = b"".join(end.to_bytes(8, "little") for end in lengths.cumsum(0).tolist())
        shard: dict[str, Any] = {"tokens": len(flat), "documents": len(documents)}
        for key, name, content in (("", "shard-00000.bin", tokens), ("ends_", "shard-00000.ends.u64", ends)):
            path = directory / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            shard[f"{key}path"] = f"{split}/{name}"
            shard[f"{key}sha256"] = hashlib.sha256(content).hexdigest()
        counts = {"documents": len(documents), "tokens": len(flat), "bytes": len(flat) - len(documents)}
        record[split] = {**counts, "shards": [shard]}
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    (directory / "manifest.json").write_text(json.dumps(record))


def write_inputs(out: Path) -> None:
    """The data of all layouts in OUT/tiny, and DeepSpeed's configuration."""
    write_prepared(out / "tiny" / "data", real_tokens(), real_tokens()[:1])
    for name, pattern in (("lines", "a*.py"), ("others", "b*.py")):
        write_prepared(out / "tiny" / name, line_tokens(pattern), line_tokens(pattern)[:5])
    # By default, ZeRO-3 keeps parameters of up to 100,000 elements whole: all that the tiny model has.
    partition_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    (out / DEEPSPEED).write_text(json.dumps(partition_all))


def padded_batches(micro_batch: int) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches [B, S] of one global stream of sequences of any length, padded in front.

    Each is as long as its longest sequence: of four ranks, the first has no padding and the last has
    sequences of two tokens.
    """
    stream = torch.tensor([token for document in real_tokens() for token in document])
    rank, per_rank = dist.get_rank(), SEQUENCES // dist.get_world_size()
    for step in range(STEPS):
        ids_BS = stream[step * SEQUENCES * LENGTH :][: SEQUENCES * LENGTH].view(SEQUENCES, LENGTH).clone()
        lengths_B = torch.tensor([LENGTH, 25 + step, 11, 2]).repeat_interleave(SEQUENCES // 4)
        mask_BS = torch.arange(LENGTH) >= LENGTH - lengths_B[:, None]
        ids_BS[~mask_BS] = PAD
        # The first token is no target either: padding would have to predict it.
        labels_BS = ids_BS.masked_fill(torch.arange(LENGTH) <= LENGTH - lengths_B[:, None], -100)
        batch = {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": mask_BS.long()}
        for start in range(rank * per_rank, (rank + 1) * per_rank, micro_batch):
            rows = slice(start, start + micro_batch)
            yield {name: tensor[rows, -lengths_B[rows].max() :] for name, tensor in batch.items()}


# --- one rank of the layouts, on the code of the recorded checkout ----------------------------------------


def compose_function() -> Callable[..., Any]:
    """olmoe_train.config.compose, or the same for checkouts from before there was one."""
    config = importlib.import_module("olmoe_train.config")
    if hasattr(config, "compose"):
        found: Callable[..., Any] = config.compose
        return found
    cli = importlib.import_module("olmoe_train.cli")

    def compose(*overrides: str) -> Any:
        schema = cli.writable(OmegaConf.structured(config.TrainConfig))
        ConfigStore.instance().store("train_schema", node=schema)
        with hydra.initialize_config_dir(str(cli.config_directory()), version_base="1.3"):
            return cli.to_config(hydra.compose("train", list(overrides)))

    return compose


def work(out: Path) -> None:
    """Train every layout of this world size."""
    from olmoe_train.train import train

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    compose = compose_function()
    for name, chosen in LAYOUTS.items():
        if chosen.ranks == dist.get_world_size():
            run = f"run_dir={run_directory(out, name)} data.dir={out}/tiny/data"
            cfg = compose(*f"{TINY} {chosen.overrides} {run}".replace("OUT/", f"{out}/").split())
            train(cfg, padded_batches(cfg.trainer.micro_batch_size) if chosen.padded else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))

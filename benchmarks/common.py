"""What benchmarks share: gloo ranks, the trainer's step without its loop, and prepared tokens."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from olmoe_train.config.train import TrainConfig
from olmoe_train.data.manifest import TOKENIZER, Manifest, Split, write_manifest
from olmoe_train.data.prepare.shards import SplitWriter
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.clipping import clip_gradients
from olmoe_train.optim.roles import parameter_groups
from olmoe_train.training.batch import Batch, Totals, count_tokens
from olmoe_train.training.build import build_model
from olmoe_train.training.objectives.next_token import NextToken

EOS, PAD = 0, 1


def run_ranks(ranks: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Call fn(*args) on `ranks` new processes of one gloo group, with one thread each.

    The processes are those of torchrun: `fn`, its arguments and its result are pickled, and an error on one
    rank ends all ranks.

    Returns:
        The results in rank order.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="benchmark",
        max_restarts=0,
    )
    results = elastic_launch(config, _on_rank)(fn, args)
    return [results[rank] for rank in range(ranks)]


def _on_rank(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)  # ranks share the cores
    init_distributed("cpu")
    result = fn(*args)
    dist.barrier()
    dist.destroy_process_group()
    return result


class BareStep:
    """One step of the trainer without its loop: forward, losses, backward, clipping and optimizer."""

    def __init__(self, cfg: TrainConfig) -> None:
        """Build the parts in the process group, or in a new group of one rank."""
        self.cfg = cfg
        self.device = init_distributed("cpu")
        self.model = build_model(cfg, build_mesh(cfg.parallel, self.device))
        self.optimizer = build_optimizer(parameter_groups(self.model, cfg.optimizer), cfg.optimizer)
        self.objective = NextToken(self.model, self.device)

    def random_batch(self) -> Batch:
        """Random tokens: input_ids and targets, int64 [micro_batch_size, sequence_length]."""
        shape = (self.cfg.trainer.micro_batch_size, self.cfg.data.sequence_length)
        ids_BS = torch.randint(2, self.cfg.model.vocab_size, shape)
        return {"input_ids": ids_BS, "targets": ids_BS.roll(-1, 1)}

    def count(self, batches: list[Batch]) -> Totals:
        """The counts over all ranks by which the losses of these micro-batches are divided; collective."""
        return count_tokens(batches, False, self.device)

    def backward(self, batch: Batch, totals: Totals) -> None:
        self.objective(self.model, batch, totals)[0].backward()

    def __call__(self, batch: Batch, totals: Totals) -> None:
        """Make a step of one micro-batch."""
        self.backward(batch, totals)
        self.update()

    def update(self) -> None:
        """Clip the gradients, make the optimizer's update and clear the gradients."""
        clip_gradients(self.model.parameters(), self.cfg.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def write_prepared(
    directory: Path,
    train: Sequence[np.ndarray],
    validation: Sequence[np.ndarray] = (),
    *,
    vocab_size: int,
    train_mask: Sequence[np.ndarray] | None = None,
) -> Path:
    """Write prepared data of given documents, with a tokenizer that is an empty file of JSON.

    Args:
        directory: Where to write; must not exist.
        train: Documents of the training split, uint16 [tokens], each with EOS as its last token.
        validation: Documents of the validation split.
        vocab_size: Token ids are below it.
        train_mask: Loss masks of `train`, uint8 [tokens].

    Returns:
        `directory`.
    """
    tokenizer = b"{}"
    (directory / TOKENIZER).mkdir(parents=True)
    (directory / TOKENIZER / "tokenizer.json").write_bytes(tokenizer)
    manifest = Manifest(
        settings={},
        source="random numbers",
        skipped_empty_documents=0,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        dtype="uint16",
        vocab_size=vocab_size,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bytes_per_token=4.0,
        unigram_entropy=None,
        train=_write_split(directory, "train", train, train_mask, vocab_size),
        validation=_write_split(directory, "validation", validation, None, vocab_size),
    )
    write_manifest(directory, manifest)
    return directory


def _write_split(
    directory: Path,
    name: str,
    documents: Sequence[np.ndarray],
    masks: Sequence[np.ndarray] | None,
    vocab_size: int,
) -> Split:
    writer = SplitWriter(directory, name, 10**10, vocab_size, np.dtype("<u2"), masked=masks is not None)
    if documents:
        lengths = [len(document) for document in documents]
        tokens = np.concatenate(documents).astype("<u2")
        targets = None if masks is None else np.concatenate(masks)
        writer.add(tokens, lengths, 4 * len(tokens), targets)
    return writer.finish()

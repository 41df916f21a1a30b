"""Validation loss, perplexity and bits per byte of a model on prepared data.

The loss is the mean over all target tokens. It does not depend on how tokens are divided into sequences,
batches and ranks.

Shapes: V vocabulary, P parts of the sequence, N sequences with targets.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.loader import build_eval_batches
from olmoe_train.data.mixture import VALIDATION, mixture_components, only_directory, read_manifests
from olmoe_train.data.remote import local_directory
from olmoe_train.data.token_bytes import token_bytes_or_reason
from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.cross_entropy import IGNORE_INDEX
from olmoe_train.model.loss_record import POSITION_PARTS, mean_losses, record_target_losses, sums_by_position
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.finite import first_not_finite

Batches = Iterable[dict[str, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Loss of a model on one set of tokens."""

    loss: float
    """Mean cross-entropy, in nats per target token. NaN: there is no target token."""
    tokens: int
    """Number of target tokens: tokens with a label that are not the first of their sequence."""
    position_sums: list[list[float]] = field(default_factory=list)
    """[P][2]: cross-entropy in nats, summed, and number of target tokens by position in the sequence, in P
    equal parts."""
    bytes: int | None = None
    """UTF-8 bytes of the target tokens. None: the tokenizer does not say."""
    sequence_sums: NDArray[np.float64] | None = None
    """[N, 2]: cross-entropy in nats, summed, and number of target tokens of each sequence. None: not kept."""

    @property
    def loss_by_position(self) -> list[float | None]:
        """P losses in nats per target token; None where there is no target."""
        return mean_losses(self.position_sums)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity if that exceeds the largest float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """-sum log2 p(target) / bytes. A special token, such as end of text, has 0 bytes, and its loss
        counts. None: the bytes are not known, or there are none."""
        return self.loss * self.tokens / (math.log(2) * self.bytes) if self.bytes else None


def evaluate_data(
    model: OlmoeForCausalLM,
    data: DataConfig,
    cfg: EvaluationConfig,
    device: torch.device,
    with_heartbeat: Callable[[Batches], Batches] = iter,
    check_finite: bool = False,
    keep_sequences: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate a model on the validation split of every source of the data. Collective, if there are ranks.

    Args:
        model: The model, whole or sharded.
        data: The prepared data, one directory or a mixture.
        cfg: Batch size, and number of sequences per source.
        device: The device of this rank.
        with_heartbeat: Wraps the batches, to report progress to the watchdog.
        check_finite, keep_sequences: As for `evaluate_model`.

    Returns:
        Name of the source -> result, for every source that has a validation split. The last one,
        "validation", is the result over the tokens of all sources.

    Raises:
        UserError: No source has a validation split; or as `evaluate_model`.
    """
    manifests = read_manifests(data)
    bytes_V, _ = token_bytes_or_reason(data)
    with_validation = [
        source for source in mixture_components(data) if manifests[source.name].validation.tokens
    ]
    results = {}
    # If no source has a validation split, the loader raises its error for the first one.
    for source in with_validation or mixture_components(data)[:1]:
        batches = with_heartbeat(_batches(data, source.directory, cfg))
        results[source.name] = evaluate_model(model, batches, device, check_finite, bytes_V, keep_sequences)
    parts = list(results.values())
    if len(parts) > 1:
        tokens = sum(part.tokens for part in parts)
        loss = sum(part.loss * part.tokens for part in parts if part.tokens) / max(1, tokens)
        by_position = torch.tensor([part.position_sums for part in parts], dtype=torch.float64).sum(0)
        text = None if bytes_V is None else sum(part.bytes or 0 for part in parts)
        kept = [part.sequence_sums for part in parts if part.sequence_sums is not None]
        sequences = np.concatenate(kept) if kept else None
        loss = loss if tokens else math.nan
        parts.append(Evaluation(loss, tokens, by_position.tolist(), text, sequences))
    return results | {VALIDATION: parts[-1]}


def evaluate_sets(
    model: OlmoeForCausalLM,
    data: DataConfig,
    cfg: EvaluationConfig,
    device: torch.device,
    with_heartbeat: Callable[[Batches], Batches] = iter,
    check_finite: bool = False,
    keep_sequences: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate a model on the sets of evaluation.sets. Collective, if there are ranks.

    Args:
        model, device, with_heartbeat, check_finite, keep_sequences: As for `evaluate_data`.
        data: Sequence length, packing and tokenizer, which the sets share.
        cfg: The sets, batch size, and number of sequences per set.

    Returns:
        Name of the set -> result on its validation split, in the order of evaluation.sets.
    """
    bytes_V, _ = token_bytes_or_reason(data) if cfg.sets else (None, None)
    results = {}
    for one in cfg.sets:
        batches = with_heartbeat(_batches(data, local_directory(data, one.dir), cfg))
        results[one.name] = evaluate_model(model, batches, device, check_finite, bytes_V, keep_sequences)
    return results


def _batches(data: DataConfig, directory: Path, cfg: EvaluationConfig) -> Batches:
    """This rank's batches of the validation split of one prepared directory."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    one = only_directory(data, directory)
    return build_eval_batches(one, rank, world_size, cfg.micro_batch_size, cfg.max_sequences)


def evaluate_model(
    model: OlmoeForCausalLM,
    batches: Batches,
    device: torch.device,
    check_finite: bool = False,
    bytes_V: Tensor | None = None,
    keep_sequences: bool = False,
) -> Evaluation:
    """Evaluate a model on batches. Collective, if there are ranks. The model's mode is restored.

    Args:
        model: The model, whole or sharded.
        batches: Keyword arguments of `training_forward`, tensors [B, S] on any device. Every rank must have
            equally many, because the forward pass of a sharded model is a collective.
        device: The device of this rank.
        check_finite: Whether to stop at a loss that is not finite. Only for a whole model: the logits are
            computed again, without the other ranks.
        bytes_V: int64, UTF-8 bytes of each token id. None: bytes are not counted.
        keep_sequences: Whether the result has the sums of each sequence, rank by rank.

    Returns:
        The result over the target tokens of all ranks. Sums are fp64.

    Raises:
        UserError: `check_finite` is true, and a loss is not finite; the message names the first such logit.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # losses, target tokens, their bytes
    if bytes_V is not None:
        bytes_V = bytes_V.to(device)
    position_P2 = torch.zeros(0, 2, dtype=torch.float64, device=device)
    sequences: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with record_target_losses(model) as chunks:
                ce_sum = model.training_forward(**inputs).ce_sum
            if check_finite and not ce_sum.isfinite():
                raise UserError(_why_not_finite(model, inputs))
            is_target_BS = inputs["targets"] != IGNORE_INDEX
            sums[0] += ce_sum
            sums[1] += is_target_BS.sum()
            if bytes_V is not None:
                sums[2] += bytes_V[inputs["targets"][is_target_BS]].sum()
            losses_BS = torch.cat(chunks).view_as(is_target_BS)
            by_position_P2 = sums_by_position(
                losses_BS, is_target_BS, min(POSITION_PARTS, losses_BS.shape[1])
            )
            position_P2 = by_position_P2 if not len(position_P2) else position_P2 + by_position_P2
            if keep_sequences:
                sequences.append(torch.stack([losses_BS.double().sum(1), is_target_BS.sum(1).double()], 1))
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(position_P2)
    loss_sum, tokens, text = sums.tolist()
    loss = loss_sum / tokens if tokens else math.nan
    kept = _of_all_ranks(sequences) if keep_sequences else None
    return Evaluation(loss, int(tokens), position_P2.tolist(), None if bytes_V is None else int(text), kept)


def _of_all_ranks(sequences: list[Tensor]) -> NDArray[np.float64]:
    """[N, 2], the sums of the sequences that have targets, rank by rank. Collective, if there are ranks."""
    mine_N2 = torch.cat(sequences).cpu().numpy() if sequences else np.empty((0, 2))
    sums_N2 = np.concatenate(gather_from_all(lambda: mine_N2) if dist.is_initialized() else [mine_N2])
    return sums_N2[sums_N2[:, 1] > 0]


def _why_not_finite(model: OlmoeForCausalLM, inputs: dict[str, Tensor]) -> str:
    """Compute the logits of a batch whose loss is not finite, and name the first one that is not finite."""
    hidden_states: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda module, args, out: hidden_states.append(out))
    try:
        model.training_forward(**inputs)
    finally:
        handle.remove()
    logits_BSV = model.lm_head(hidden_states[0])
    found = first_not_finite(logits_BSV)
    what = f"logits{found} (sequence, position, token)" if found else "the logits are finite, but huge"
    return (
        f"the loss of a batch is not finite: {what}: the weights are damaged, or {logits_BSV.dtype} cannot "
        "hold what the model computes"
    )

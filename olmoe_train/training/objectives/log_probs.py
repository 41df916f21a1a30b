"""Log-probabilities of completions: of one micro-batch, and of all documents of a split.

Shapes: N documents of a micro-batch, D documents of a split, P targets of a micro-batch.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.data.preferences import MISMATCHED
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.router_stats import RouterStats
from olmoe_train.training.batch import Batch, decoder_inputs

REPEATED = -1
"""Document id of a document that a pass over the data has had already."""


def target_log_probs(model: OlmoeForCausalLM, batch: Batch, prefix: str = "") -> tuple[Tensor, RouterStats]:
    """Run the model on a micro-batch of completions.

    Args:
        model: Whole or sharded.
        batch: The columns of CollatePreferences, on the device.
        prefix: "", or MISMATCHED for kto's mismatched completions.

    Returns:
        (Log-probability of each target, fp32 [P]; the routers' sums).
    """
    output = model.training_forward(
        **decoder_inputs(batch, prefix),
        targets=batch[prefix + "target_ids"],
        target_positions=batch[prefix + "target_positions"],
    )
    assert output.log_probs is not None
    return output.log_probs, output.router


def completion_log_probs(
    model: OlmoeForCausalLM, batch: Batch, prefix: str = ""
) -> tuple[Tensor, RouterStats]:
    """Sum what `target_log_probs` returns over the tokens of each completion.

    Returns:
        (Summed log-probability of each document's completion, fp64 [N]; the routers' sums). The order of
        summation is that of the tokens, whatever the layout.
    """
    log_probs_P, router = target_log_probs(model, batch, prefix)
    # unsafe: without it the host reads the lengths back to check that they add up to P.
    lengths_N = batch[prefix + "completion_lengths"]
    # fp64: of two sums of thousands of nats, as fp32, the loss would see a difference that is off by 5e-4.
    sum_N = torch.segment_reduce(log_probs_P.double(), "sum", lengths=lengths_N, unsafe=True)
    return sum_N, router


@contextmanager
def without_dropout(model: OlmoeForCausalLM) -> Iterator[None]:
    """Run the block with the model in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class SplitLogProbs:
    """Log-probabilities of the documents of a split, on the CPU, the same on every rank."""

    sum_D: Tensor
    """Summed over the tokens of each completion, fp64; 0 where `tokens_D` is 0."""
    tokens_D: Tensor
    """Tokens of each completion, fp64; 0 where the document was not visited."""
    wanted_D: Tensor
    """bool, the labels."""
    mismatched_D: Tensor | None
    """As `sum_D`, of the mismatched completions; None for pairs."""


@torch.no_grad()
def split_log_probs(
    model: OlmoeForCausalLM,
    batches: Iterable[Batch],
    first_document: int,
    documents: int,
    device: torch.device,
) -> SplitLogProbs:
    """Compute the log-probabilities of all documents that the batches of all ranks contain, without dropout.

    Collective: every rank has equally many batches, and each document is in one of them.

    Args:
        model: Whole or sharded.
        batches: This rank's micro-batches, on any device. Documents with the id REPEATED are left out.
        first_document: The id of the split's first document.
        documents: D.
        device: The device of this rank.
    """
    columns_4D = torch.zeros(4, documents, dtype=torch.float64, device=device)
    has_mismatched = False
    with without_dropout(model):
        for on_any_device in batches:
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in on_any_device.items()}
            sum_N, _ = completion_log_probs(model, batch)
            columns = [sum_N, batch["completion_lengths"].double(), batch["wanted"].double()]
            has_mismatched = MISMATCHED + "input_ids" in batch
            if has_mismatched:
                columns.append(completion_log_probs(model, batch, MISMATCHED)[0])
            ids_N = batch["document_ids"]
            first_N = ids_N != REPEATED
            place_N = ids_N[first_N] - first_document
            for row, column_N in enumerate(columns):
                columns_4D[row, place_N] = column_N[first_N]
    if dist.is_initialized():
        dist.all_reduce(columns_4D)  # exact: all but one of the addends are 0
    sum_D, tokens_D, wanted_D, mismatched_D = columns_4D.cpu()
    return SplitLogProbs(sum_D, tokens_D, wanted_D > 0, mismatched_D if has_mismatched else None)

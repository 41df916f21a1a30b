"""Loss and routing of each document of one optimizer step, by a forward pass over the step's sequences.

Shapes: B sequences of a micro-batch, S sequence length, T = B x S tokens, N documents of a rank, M documents
of the step that are looked at closely, L layers, E experts, K top-k.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.data.loader import Sample, TrainSamples, collate
from olmoe_train.data.origins import segments
from olmoe_train.data.sequences import Sequences
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.cross_entropy import IGNORE_INDEX
from olmoe_train.model.moe.routing_record import record_routing
from olmoe_train.training.batch import DECODER_INPUTS, Batch, to_device
from olmoe_train.training.objectives.log_probs import without_dropout

Key = tuple[int, int]
"""A document: number of its source, number of the document in the training split of the source."""
PADDING = -1
"""Number of the document of a position that has none."""


class StepDocuments:
    """This rank's sequences of one step, with the document of every token."""

    def __init__(self, samples: TrainSamples, micro_batches: list[list[int]]) -> None:
        """Read the sequences.

        Args:
            samples: The training samples of the run.
            micro_batches: Global indices of the samples of each micro-batch.
        """
        self.keys: list[Key] = []
        """The documents of this rank (N), in the order in which they come."""
        self.samples: list[Sample] = []
        """Every sequence."""
        self.numbers_S: list[np.ndarray] = []
        """For each sequence, the number in `keys` of the document of each token, int64 [S]."""
        self._known: dict[Key, int] = {}
        self._sizes = [len(indices) for indices in micro_batches]
        for index in (index for indices in micro_batches for index in indices):
            self.samples.append(samples[index])
            self.numbers_S.append(self._documents_of(samples, index, len(self.samples[-1]["input_ids"])))

    def _documents_of(self, samples: TrainSamples, index: int, length: int) -> np.ndarray:
        source, number = samples.place(index)
        sequences = samples.sequences[source]
        assert isinstance(sequences, Sequences), "only next-token prediction is explained"
        numbers_S = np.full(length, PADDING, np.int64)
        for segment in segments(sequences, number):
            key = source, segment.document
            if key not in self._known:
                self._known[key] = len(self.keys)
                self.keys.append(key)
            numbers_S[segment.start : segment.stop] = self._known[key]
        return numbers_S

    def micro_batches(self) -> Iterable[tuple[Batch, Tensor, Tensor]]:
        """Yield (micro-batch, document of each token, document of each target), int64 [B, S], on the CPU."""
        first = 0
        for size in self._sizes:
            rows = slice(first, first + size)
            tokens_BS = torch.from_numpy(np.stack(self.numbers_S[rows]))
            targets_BS = torch.from_numpy(np.stack([target_documents(row) for row in self.numbers_S[rows]]))
            batch = collate(self.samples[rows])
            batch.pop("repetitive", None)
            yield batch, tokens_BS, targets_BS
            first += size

    def sequences_of(self, key: Key) -> list[int]:
        """Numbers of this rank's sequences in which a token of the document is a target."""
        if key not in self._known:
            return []
        number, found = self._known[key], []
        for row, (sample, numbers_S) in enumerate(zip(self.samples, self.numbers_S, strict=True)):
            if (sample["targets"][target_documents(numbers_S) == number] != IGNORE_INDEX).any():
                found.append(row)
        return found

    def only_targets_of(self, row: int, key: Key | None) -> Batch:
        """One sequence as a micro-batch on the CPU. Its only targets are those of a document; None: none."""
        sample = dict(self.samples[row])
        sample.pop("repetitive", None)
        number = PADDING if key is None else self._known[key]
        is_own_S = (target_documents(self.numbers_S[row]) == number) & (key is not None)
        sample["targets"] = np.where(is_own_S, sample["targets"], IGNORE_INDEX)
        return collate([sample])


def target_documents(numbers_S: np.ndarray) -> np.ndarray:
    """Document of the target of each position: that of the next token. The last position has no target."""
    return np.append(numbers_S[1:], PADDING)


@dataclass(frozen=True)
class DocumentLoss:
    """One document's part in a step, over all ranks."""

    key: Key
    tokens: int
    """Tokens in the sequences of the step."""
    targets: int
    """Target tokens among them."""
    loss: float
    """Cross-entropy in nats, summed over the target tokens."""


@dataclass(frozen=True)
class StepLosses:
    """The documents of a step, the most conspicuous one first; equal on every rank."""

    documents: list[DocumentLoss]
    routed_NLE: Tensor | None
    """Tokens of each of this rank's documents that each layer sent to each expert, fp32 on the CPU."""
    keys: list[Key]
    """This rank's documents (N)."""

    @property
    def targets(self) -> int:
        """Target tokens of the step; at least 1, as in the loss."""
        return max(1, sum(document.targets for document in self.documents))

    @property
    def ce_loss(self) -> float:
        """Cross-entropy of the step in nats per target token."""
        return math.fsum(document.loss for document in self.documents) / self.targets

    def routing(self, keys: list[Key]) -> tuple[Tensor, Tensor] | None:
        """Sum the routing over ranks. Collective.

        Args:
            keys: Documents of the step (M), equal on every rank.

        Returns:
            (Tokens of each of these documents [M, L, E], of all tokens [L, E]), fp32 on the CPU; None if the
            routing was not recorded.
        """
        if self.routed_NLE is None:
            return None
        number = {key: place for place, key in enumerate(self.keys)}
        counts = torch.zeros(len(keys) + 1, *self.routed_NLE.shape[1:])
        for place, key in enumerate(keys):
            if key in number:
                counts[place] = self.routed_NLE[number[key]]
        counts[-1] = self.routed_NLE.sum(0)
        dist.all_reduce(counts)
        return counts[:-1], counts[-1]


Heartbeat = Callable[[Iterable[tuple[Batch, Tensor, Tensor]]], Iterable[tuple[Batch, Tensor, Tensor]]]


@torch.no_grad()
def step_losses(
    model: OlmoeForCausalLM,
    step: StepDocuments,
    device: torch.device,
    with_heartbeat: Heartbeat = iter,
    with_routing: bool = True,
) -> StepLosses:
    """Compute loss and routing of every document of a step, without dropout. Collective.

    Args:
        model: Whole or sharded, of any engine, in training mode.
        step: This rank's sequences. Every rank has equally many micro-batches.
        device: The device of this rank.
        with_heartbeat: Wraps the micro-batches.
        with_routing: Whether to record which experts the tokens went to. With expert choice it is not
            recorded.
    """
    config, count = model.config, len(step.keys)
    with_routing = with_routing and config.routing == "token_choice"
    sums = torch.zeros(3, count, dtype=torch.float64)  # tokens, targets, loss
    layers, experts = config.num_hidden_layers, config.num_experts
    routed_LNE = torch.zeros(layers, count * experts)
    with as_in_training(model), record_routing(model) if with_routing else nullcontext() as passes_L:
        for batch, tokens_BS, targets_BS in with_heartbeat(step.micro_batches()):
            losses_T = target_losses(model, to_device(batch, device)).double().cpu()
            is_target_T = (batch["targets"] != IGNORE_INDEX).flatten()
            targets_T, tokens_T = targets_BS.flatten()[is_target_T], tokens_BS.flatten()
            sums[0] += torch.bincount(tokens_T[tokens_T != PADDING], minlength=count)
            sums[1] += torch.bincount(targets_T, minlength=count)
            sums[2].index_add_(0, targets_T, losses_T[is_target_T])
            for layer, passes in enumerate(passes_L or []):
                indices_TK = passes.pop().cpu()[tokens_T != PADDING]
                places_TK = tokens_T[tokens_T != PADDING][:, None] * experts + indices_TK
                routed_LNE[layer] += torch.bincount(places_TK.flatten(), minlength=count * experts)
    routed_NLE = routed_LNE.view(layers, count, experts).transpose(0, 1) if with_routing else None
    return StepLosses(_over_ranks(step.keys, sums), routed_NLE, step.keys)


def as_in_training(model: OlmoeForCausalLM) -> AbstractContextManager[None]:
    """Keep the model in its mode, in which it computes what training computes, unless there is noise.

    In eval mode the experts choose among matrix products by speed (experts.py), and in bf16 these round
    differently.
    """
    noise = max(model.config.attention_dropout, model.adapter.dropout if model.adapter else 0.0)
    noise = max(noise, model.decoder_layers[0].mlp.gate.jitter)
    return without_dropout(model) if noise > 0 else nullcontext()


def target_losses(model: OlmoeForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy at every position of a micro-batch, fp32 [T]; any value where there is no target."""
    inputs = {name: batch[name] for name in DECODER_INPUTS if name in batch}
    targets_T = batch["targets"].flatten().clamp(min=0)
    # All positions, also those without a target: then every rank has the same number, and never none.
    positions_T = torch.arange(len(targets_T), device=targets_T.device)
    output = model.training_forward(**inputs, targets=targets_T, target_positions=positions_T)
    assert output.log_probs is not None
    return -output.log_probs


def _over_ranks(keys: list[Key], sums: Tensor) -> list[DocumentLoss]:
    """Add up the documents of all ranks, and put the most conspicuous one first. Collective.

    A document counts by the loss that it has above the mean of the step: a long document with an ordinary
    loss per token is not conspicuous. Documents whose loss is not finite come before all others, in the order
    of the batch: within a sequence, the values of one document spoil those after it.
    """
    gathered: list[list[tuple[Key, list[float]]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(zip(keys, sums.T.tolist(), strict=True)))
    total: dict[Key, list[float]] = {}
    for key, values in (item for of_rank in gathered for item in of_rank):
        before = total.setdefault(key, [0.0, 0.0, 0.0])
        total[key] = [mine + theirs for mine, theirs in zip(before, values, strict=True)]
    found = [
        DocumentLoss(key, int(tokens), int(targets), loss) for key, (tokens, targets, loss) in total.items()
    ]
    finite = [document for document in found if math.isfinite(document.loss)]
    mean = math.fsum(d.loss for d in finite) / max(1, sum(d.targets for d in finite))

    def excess(document: DocumentLoss) -> float:
        value = document.loss - mean * document.targets
        return value if math.isfinite(value) else math.inf

    return sorted(found, key=excess, reverse=True)  # stable: equal ones stay in the order of the batch

"""Count how a model routes tokens. Memory does not grow with the number of tokens: only counts are kept.

Shapes: T unpadded tokens of a batch, D hidden, E experts, K top-k, L layers, V vocabulary, N domains.

Every count is an integer, and the two sums that are not are added in the order of the batches. The results
are therefore the same for any number of ranks, as long as each rank computes a batch in the same way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from olmoe_train.config.data import DataConfig
from olmoe_train.data.loader import build_eval_batches
from olmoe_train.data.mixture import (
    MixtureComponent,
    has_sources,
    mixture_components,
    only_directory,
    read_manifests,
)
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.cross_entropy import IGNORE_INDEX
from olmoe_train.model.moe.experts import OlmoeExperts, sort_by_expert
from olmoe_train.utils.errors import UserError

Batch = dict[str, Tensor]
INPUT, PREDICTED, NEXT = "input", "predicted", "next"
TOKEN_KINDS = (INPUT, PREDICTED, NEXT)
"""The token that a position reads, the one that the model finds most probable after it, and the one that
follows in the data."""
CHUNK_TOKENS = 2048
"""Tokens whose logits, or whose experts' outputs, are in memory at a time."""


@dataclass
class RoutingCounts:
    """Sums over unpadded tokens, on one device. `k` is 1 or top_k: the k most probable experts of a token."""

    tokens_N: Tensor
    """int64 [N]: tokens of each domain."""
    by_domain: dict[int, Tensor]
    """k -> int64 [N, L, E]: tokens of each domain whose first k experts include the expert."""
    pairs_LEE: Tensor
    """int64 [L, E, E]: tokens that activate both experts."""
    neighbors_LEE: Tensor
    """int64 [L, E, E]: tokens that have the two experts next to each other in the order of probability."""
    gates_LE: Tensor
    """fp64 [L, E]: sum of the routing weights of the tokens that activate the expert."""
    weighted_norms_LE: Tensor
    """fp64 [L, E]: sum of routing weight x 2-norm of the expert's output."""
    probabilities_LE: Tensor
    """fp64 [L, E]: sum over all tokens of the probability that the router gives the expert."""
    occurrences: dict[str, Tensor] = field(default_factory=dict)
    """Kind of token -> int64 [V]: positions with this token id. Empty without vocabulary counts."""
    by_token: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(kind of token, k) -> int32 [L, V, E]: positions with the token id whose first k experts include the
    expert. Empty without vocabulary counts."""
    shared: dict[int, Tensor] = field(default_factory=dict)
    """k -> int64 [L]: sum over tokens of the experts that are among the first k here and in the reference.
    Empty without a reference."""

    @property
    def top_k(self) -> int:
        """K."""
        return max(self.by_domain)

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64 [L, E]: tokens that activate each expert."""
        return self.pairs_LEE.diagonal(dim1=1, dim2=2)


def zero_counts(
    model: OlmoeForCausalLM, domains: int, vocabulary: bool, reference: bool, device: torch.device
) -> RoutingCounts:
    """Counts of no tokens.

    Args:
        model: The model to count for.
        domains: N.
        vocabulary: Whether to count by token id: 24 L V E bytes.
        reference: Whether routing is compared with that of a reference.
        device: Where the counts are kept.
    """
    config = model.config
    layers, experts = config.num_hidden_layers, config.num_experts
    sizes = sorted({1, config.num_experts_per_tok})

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    tables = [(kind, k) for kind in TOKEN_KINDS for k in sizes] if vocabulary else []
    return RoutingCounts(
        tokens_N=zeros(domains),
        by_domain={k: zeros(domains, layers, experts) for k in sizes},
        pairs_LEE=zeros(layers, experts, experts),
        neighbors_LEE=zeros(layers, experts, experts),
        gates_LE=zeros(layers, experts, dtype=torch.float64),
        weighted_norms_LE=zeros(layers, experts, dtype=torch.float64),
        probabilities_LE=zeros(layers, experts, dtype=torch.float64),
        occurrences={kind: zeros(config.vocab_size) for kind, _ in tables},
        by_token={table: zeros(layers, config.vocab_size, experts, dtype=torch.int32) for table in tables},
        shared={k: zeros(layers) for k in sizes} if reference else {},
    )


def validated_components(data: DataConfig) -> list[MixtureComponent]:
    """The domains: the sources of the mixture that have a validation split, or data.dir.

    A single data.dir is named like its directory.

    Raises:
        UserError: There is no validation split.
    """
    manifests = read_manifests(data)
    found = [one for one in mixture_components(data) if manifests[one.name].validation.tokens]
    if not found:
        raise UserError(
            f"data.dir={data.dir}: has no validation split, and routing is analyzed on validation tokens.\n"
            "  Prepare it again, elsewhere, with data.source.validation_fraction above 0."
        )
    if has_sources(data):
        return found
    return [replace(found[0], name=found[0].directory.resolve().name)]


def domain_batches(
    data: DataConfig, micro_batch_size: int, max_sequences: int | None, rank: int, world_size: int
) -> list[DataLoader[Batch]]:
    """This rank's validation batches of each domain; equally many on every rank.

    Args:
        data: The prepared data, one directory or a mixture.
        micro_batch_size: Sequences per batch.
        max_sequences: Sequences per domain, over all ranks; None: all.
        rank: This rank.
        world_size: Number of ranks.
    """
    return [
        build_eval_batches(
            only_directory(data, one.directory),
            rank,
            world_size,
            micro_batch_size,
            max_sequences,
        )
        for one in validated_components(data)
    ]


@torch.no_grad()
def count_routing(
    model: OlmoeForCausalLM,
    batches_N: Sequence[Iterable[Batch]],
    device: torch.device,
    vocabulary: bool = True,
    reference: OlmoeForCausalLM | None = None,
    after_batch: Callable[[], object] = lambda: None,
) -> RoutingCounts:
    """Count how a model routes tokens. Collective, if there are ranks; every rank holds the whole model.

    Args:
        model: In eval mode, on `device`.
        batches_N: For each domain this rank's batches, from `domain_batches`.
        device: The device of this rank.
        vocabulary: Whether to count by token id.
        reference: Another model with the same numbers of layers and experts, whose routing of the same
            tokens is compared. None: no comparison.
        after_batch: Called after each batch, to report progress.

    Returns:
        The counts over the tokens of all ranks, on the CPU.
    """
    counts = zero_counts(model, len(batches_N), vocabulary, reference is not None, device)
    for domain, batches in enumerate(batches_N):
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            sums_3LE = torch.zeros(3, *counts.gates_LE.shape, dtype=torch.float64)
            if bool(inputs["attention_mask"].any()):  # not a batch that only fills up the last round
                sums_3LE = add_batch(counts, domain, model, inputs, reference)
            for of_rank_3LE in in_rank_order(sums_3LE):
                gates_LE, norms_LE, probabilities_LE = of_rank_3LE.to(device)
                counts.gates_LE += gates_LE
                counts.weighted_norms_LE += norms_LE
                counts.probabilities_LE += probabilities_LE
            after_batch()
    return sum_over_ranks(counts)


def add_batch(
    counts: RoutingCounts,
    domain: int,
    model: OlmoeForCausalLM,
    batch: Batch,
    reference: OlmoeForCausalLM | None,
) -> Tensor:
    """Add one batch to the integer counts, in place.

    Args:
        counts: The counts of this rank.
        domain: Index of the batch's domain.
        model: The model.
        batch: input_ids, targets, attention_mask [B, S], and perhaps document_offsets, on the device.
        reference: The model to compare with, if any.

    Returns:
        The batch's part of (gates_LE, weighted_norms_LE, probabilities_LE), fp64 [3, L, E] on the CPU.
    """
    is_token_T = batch["attention_mask"].flatten().bool()
    sums: list[Tensor] = []

    def add_sums(layer: int, x_TD: Tensor, *routed: Tensor) -> None:
        experts = model.decoder_layers[layer].mlp.experts
        probs_TE, weights_TK, indices_TK = (tensor[is_token_T] for tensor in routed)
        sums_2E = importance_sums(experts, x_TD[is_token_T], weights_TK, indices_TK)
        sums.append(torch.cat([sums_2E, probs_TE.double().sum(0, keepdim=True)]))

    indices_LTK, hidden_TD = route(model, batch, add_sums)
    indices_LTK, hidden_TD = indices_LTK[:, is_token_T], hidden_TD[is_token_T]
    counts.tokens_N[domain] += indices_LTK.shape[1]
    for k, counts_NLE in counts.by_domain.items():
        counts_NLE[domain] += count_experts(indices_LTK[..., :k], counts_NLE.shape[-1])
    for layer, indices_TK in enumerate(indices_LTK):
        counts.pairs_LEE[layer] += count_pairs(indices_TK, counts.pairs_LEE.shape[-1])
        counts.neighbors_LEE[layer] += count_neighbors(indices_TK, counts.pairs_LEE.shape[-1])
    if counts.by_token:
        tokens = {
            INPUT: batch["input_ids"].flatten()[is_token_T],
            PREDICTED: most_probable(model.lm_head, hidden_TD),
            NEXT: batch["targets"].flatten()[is_token_T],
        }
        count_by_token(counts, tokens, indices_LTK)
    if reference is not None:
        theirs_LTK = route(reference, batch)[0][:, is_token_T]
        for k, shared_L in counts.shared.items():
            shared_L += count_shared(indices_LTK[..., :k], theirs_LTK[..., :k])
    return torch.stack(sums, 1).cpu()


SeeRouter = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Called with (layer, x_TD, probs_TE, weights_TK, indices_TK) while a layer computes."""


def route(
    model: OlmoeForCausalLM, batch: Batch, see_router: SeeRouter | None = None
) -> tuple[Tensor, Tensor]:
    """Run a whole model without its head.

    Args:
        model: The model, not sharded.
        batch: input_ids, attention_mask [B, S], and perhaps document_offsets.
        see_router: Gets what each router reads and returns.

    Returns:
        (indices_LTK int64, the most probable expert first; output of the last norm [T, D]), padding included.
    """
    indices: list[Tensor] = []

    def see(layer: int, module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        indices.append(output[3])
        if see_router is not None:
            see_router(layer, inputs[0], *output[1:])

    with observed_routers(model, see):
        decoded = model.model.run_layers(
            batch["input_ids"], batch["attention_mask"], document_offsets=batch.get("document_offsets")
        )
    return torch.stack(indices), decoded.last_hidden_state.flatten(0, 1)


@contextmanager
def observed_routers(model: OlmoeForCausalLM, see: Callable[..., None]) -> Iterator[None]:
    """Call see(layer, router, inputs, output) whenever a router has computed within the block."""
    handles = [
        layer.mlp.gate.register_forward_hook(partial(see, index))
        for index, layer in enumerate(model.decoder_layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def importance_sums(experts: OlmoeExperts, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
    """Sum the routing weights of each expert, and weight x 2-norm of the expert's output.

    Returns:
        fp64 [2, E]. A sum over tokens has a fixed order on every device: no atomic additions.
    """
    num_experts = experts.gate_up_proj.shape[0]
    weights_TK = weights_TK.double()
    weighted_TK = weights_TK * output_norms(experts, x_TD, indices_TK).double()
    per_token = [
        torch.zeros(len(x_TD), num_experts, dtype=torch.float64, device=x_TD.device).scatter_(
            1, indices_TK, values_TK
        )
        for values_TK in (weights_TK, weighted_TK)
    ]
    return torch.stack([values_TE.sum(0) for values_TE in per_token])


def output_norms(experts: OlmoeExperts, x_TD: Tensor, indices_TK: Tensor) -> Tensor:
    """Return the 2-norm of the output of each chosen expert, before the routing weight, fp32 [T, K].

    The layer only returns the weighted sum over experts. So the experts run again, with one expert per row.
    """
    norms = []
    for x_CD, indices_CK in zip(x_TD.split(CHUNK_TOKENS), indices_TK.split(CHUNK_TOKENS), strict=True):
        routing = sort_by_expert(indices_CK.reshape(-1, 1), experts.gate_up_proj.shape[0])
        out_RD = experts(x_CD.repeat_interleave(indices_CK.shape[1], 0), None, routing)
        norms.append(torch.linalg.vector_norm(out_RD.float(), dim=-1).view_as(indices_CK))
    return torch.cat(norms)


def most_probable(head: nn.Module, hidden_TD: Tensor) -> Tensor:
    """Return the most probable next token of each position, int64 [T]."""
    return torch.cat([head(hidden_CD).argmax(-1) for hidden_CD in hidden_TD.split(CHUNK_TOKENS)])


def count_experts(indices_LTK: Tensor, num_experts: int) -> Tensor:
    """Count the tokens of each expert, int64 [L, E]."""
    flat = indices_LTK.flatten(1)
    zeros_LE = torch.zeros(len(flat), num_experts, dtype=torch.int64, device=flat.device)
    return zeros_LE.scatter_add_(1, flat, torch.ones_like(flat))


def count_pairs(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Count the tokens that activate both experts of each pair, int64 [E, E]; the diagonal counts each one's
    tokens."""
    assert len(indices_TK) < 2**24, "fp32 is exact up to there"
    active_TE = torch.zeros(len(indices_TK), num_experts, device=indices_TK.device)
    active_TE.scatter_(1, indices_TK, 1.0)
    return (active_TE.T @ active_TE).long()


def count_neighbors(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Count the tokens that have two experts next to each other in the sorted top-k, int64 [E, E], symmetric.

    This is what scripts/run_moe_analysis.py of github.com/allenai/OLMoE counts (more_itertools.pairwise).
    """
    flat = (indices_TK[:, :-1] * num_experts + indices_TK[:, 1:]).flatten()
    ordered_EE = torch.bincount(flat, minlength=num_experts**2).view(num_experts, num_experts)
    return ordered_EE + ordered_EE.T


def count_by_token(counts: RoutingCounts, tokens: dict[str, Tensor], indices_LTK: Tensor) -> None:
    """Add to the counts by token id, in place.

    Args:
        counts: The counts.
        tokens: Kind of token -> int64 [T]; -100 at positions without such a token.
        indices_LTK: The experts of the positions.
    """
    num_experts = counts.pairs_LEE.shape[-1]
    for kind, tokens_T in tokens.items():
        known_T = tokens_T != IGNORE_INDEX
        ids_P, indices_LPK = tokens_T[known_T], indices_LTK[:, known_T]
        counts.occurrences[kind].scatter_add_(0, ids_P, torch.ones_like(ids_P))
        for k in counts.by_domain:
            cells_LX = (ids_P[:, None] * num_experts + indices_LPK[..., :k]).flatten(1)
            table_LX = counts.by_token[kind, k].flatten(1)
            table_LX.scatter_add_(1, cells_LX, torch.ones_like(cells_LX, dtype=torch.int32))


def count_shared(mine_LTK: Tensor, theirs_LTK: Tensor) -> Tensor:
    """Sum over tokens the number of experts that both choices include, int64 [L]."""
    same_LTKK = mine_LTK[..., :, None] == theirs_LTK[..., None, :]
    return same_LTKK.sum((1, 2, 3))


def in_rank_order(tensor: Tensor) -> list[Tensor]:
    """Gather a tensor of the CPU from all ranks. Batch number = round x ranks + rank, as with one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


def sum_over_ranks(counts: RoutingCounts) -> RoutingCounts:
    """Sum the integer counts over ranks, and bring all to the CPU. The counts in fp64 are sums already."""

    def total(tensor: Tensor) -> Tensor:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(tensor)
        return tensor.cpu()

    return RoutingCounts(
        total(counts.tokens_N),
        {k: total(tensor) for k, tensor in counts.by_domain.items()},
        total(counts.pairs_LEE),
        total(counts.neighbors_LEE),
        counts.gates_LE.cpu(),
        counts.weighted_norms_LE.cpu(),
        counts.probabilities_LE.cpu(),
        {kind: total(tensor) for kind, tensor in counts.occurrences.items()},
        {table: total(tensor) for table, tensor in counts.by_token.items()},
        {k: total(tensor) for k, tensor in counts.shared.items()},
    )

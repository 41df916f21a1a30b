"""What analysis.json says of one model: the router analyses of its counts, as JSON values.

Shapes: E experts, L layers, V vocabulary, N domains. docs/concepts/router-analyses.md describes the format.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from olmoe_train.reporting.router_analysis import (
    ALL_PAIRS,
    COACTIVATION_RULES,
    VocabularySpecialization,
    coactivation,
    domain_specialization,
    expert_importance,
    highest_pairs,
    most_coactivated,
    saturation,
    uniform_coactivation,
    vocabulary_specialization,
)
from olmoe_train.reporting.routing_counts import INPUT, PREDICTED, TOKEN_KINDS, RoutingCounts

FORMAT = "olmoe-train router analysis 1"
LISTED_PAIRS, LISTED_EXPERTS, LISTED_TOKENS = 10, 10, 10
"""Entries per layer of the lists of highest pairs, of the most specialized experts, and of their tokens."""
DIGITS = 6
"""Decimals of fractions in files."""

Record = dict[str, Any]
Decode = Callable[[int], str | None]
"""Token id -> its text; None: there is no tokenizer."""


def plain(values: Any) -> Any:
    """Numbers as JSON has them: rounded, and null for NaN."""
    if isinstance(values, np.ndarray):
        return plain(values.tolist())
    if isinstance(values, list):
        return [plain(value) for value in values]
    if isinstance(values, float):
        return round(values, DIGITS) if math.isfinite(values) else None
    return values


def describe_source(
    source: int, counts: RoutingCounts, domains: list[str], min_count: int, decode: Decode
) -> dict[str, list[Record]]:
    """Analyze the counts of one model.

    Args:
        source: Index of the model in `sources`.
        counts: Its counts, on the CPU.
        domains: Names of the domains, in the order of the counts.
        min_count: Least number of occurrences of a token id.
        decode: Makes texts of token ids.

    Returns:
        Section of analysis.json -> the entries of this model.
    """
    vocabulary, experts = _vocabulary(counts, min_count, decode)
    sections = {
        "saturation": _saturation(counts),
        "coactivation": _coactivation(counts),
        "domains": _domains(counts, domains),
        "vocabulary": vocabulary,
        "vocabulary_experts": experts,
        "importance": [_importance(counts)],
    }
    return {
        name: [{"source": source, **{key: plain(value) for key, value in entry.items()}} for entry in entries]
        for name, entries in sections.items()
    }


def _saturation(counts: RoutingCounts) -> list[Record]:
    tokens, experts = int(counts.tokens_N.sum()), counts.pairs_LEE.shape[-1]
    return [
        {"k": k, "chance": k / experts, "by_layer": saturation(shared_L.numpy(), tokens, k)}
        for k, shared_L in counts.shared.items()
    ]


def _coactivation(counts: RoutingCounts) -> list[Record]:
    experts, entries = counts.pairs_LEE.shape[-1], []
    tokens_LE = counts.tokens_per_expert.numpy()
    for rule in COACTIVATION_RULES:
        together_LEE = (counts.pairs_LEE if rule == ALL_PAIRS else counts.neighbors_LEE).numpy()
        layers = []
        for layer, tokens_E in enumerate(tokens_LE):
            share_EE = coactivation(together_LEE[layer], tokens_E)
            layers.append(
                {
                    "layer": layer,
                    "most_coactivated": most_coactivated(share_EE),
                    "highest": [
                        [i, j, plain(share)] for i, j, share in highest_pairs(share_EE, LISTED_PAIRS)
                    ],
                    "matrix": plain(share_EE),
                }
            )
        uniform = uniform_coactivation(rule, experts, counts.top_k)
        entries.append({"rule": rule, "uniform": uniform, "layers": layers})
    return entries


def _domains(counts: RoutingCounts, domains: list[str]) -> list[Record]:
    tokens_N, experts = counts.tokens_N.numpy(), counts.pairs_LEE.shape[-1]
    entries = []
    for k, counts_NLE in counts.by_domain.items():
        shares_NLE = domain_specialization(counts_NLE.numpy(), tokens_N)
        for domain, shares_LE in zip(domains, shares_NLE, strict=True):
            entries.append({"k": k, "domain": domain, "uniform": k / experts, "by_layer": shares_LE})
    return entries


def _vocabulary(counts: RoutingCounts, min_count: int, decode: Decode) -> tuple[list[Record], list[Record]]:
    """The entries of `vocabulary`, and those of `vocabulary_experts`."""
    layers, experts = counts.pairs_LEE.shape[:2]
    entries: list[Record] = []
    of_experts: dict[str, list[VocabularySpecialization]] = {}
    if not counts.by_token:
        return [], []
    for kind in TOKEN_KINDS:
        occurrences_V = counts.occurrences[kind].numpy()
        for k in counts.by_domain:
            tables_LVE = counts.by_token[kind, k].numpy()
            found = [vocabulary_specialization(table_VE, occurrences_V, min_count) for table_VE in tables_LVE]
            entries.append(
                {
                    "tokens": kind,
                    "k": k,
                    "min_count": min_count,
                    "ids": int(found[0].known_V.sum()),
                    "all_ids": int((occurrences_V > 0).sum()),
                    "by_layer": [one.mean for one in found],
                    "by_layer_all_ids": [one.mean_of_all for one in found],
                    "by_expert": [plain(one.by_expert(experts)) for one in found],
                }
            )
            if k == 1:
                of_experts[kind] = found
    listed = [
        entry
        for layer in range(layers)
        for entry in _specialized_experts(
            layer, {kind: found[layer] for kind, found in of_experts.items()}, counts, decode
        )
    ]
    return entries, listed


def _specialized_experts(
    layer: int, found: dict[str, VocabularySpecialization], counts: RoutingCounts, decode: Decode
) -> list[Record]:
    """The experts of a layer with the most specialized vocabulary, and their tokens, at k = 1.

    As in the paper's table 8: in the order of the mean share of their input ids plus that of their predicted
    ids.
    """
    experts = counts.pairs_LEE.shape[-1]
    means = {kind: found[kind].by_expert(experts) for kind in (INPUT, PREDICTED)}
    scores_E = np.nan_to_num(means[INPUT]) + np.nan_to_num(means[PREDICTED])
    order = np.argsort(-scores_E, kind="stable")
    entries = []
    for expert in (int(one) for one in order[:LISTED_EXPERTS] if scores_E[one] > 0):
        entry: Record = {"layer": layer, "expert": expert}
        for kind in (INPUT, PREDICTED):
            occurrences_V = counts.occurrences[kind].numpy()
            ids = found[kind].ids_of(expert, occurrences_V, LISTED_TOKENS)
            entry[f"{kind}_mean"] = plain(float(means[kind][expert]))
            entry[f"{kind}_tokens"] = [
                {
                    "id": int(one),
                    "text": decode(int(one)),
                    "share": plain(float(found[kind].share_V[one])),
                    "occurrences": int(occurrences_V[one]),
                }
                for one in ids
            ]
        entries.append(entry)
    return entries


def _importance(counts: RoutingCounts) -> Record:
    found = expert_importance(
        counts.tokens_per_expert.numpy(),
        counts.gates_LE.numpy(),
        counts.weighted_norms_LE.numpy(),
        int(counts.tokens_N.sum()),
    )
    return {
        "frequency": found.frequency_LE,
        "mean_gate": found.mean_gate_LE,
        "mean_weighted_norm": found.mean_weighted_norm_LE,
        "contribution": found.contribution_LE,
    }

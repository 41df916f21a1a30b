"""`olmoe analyze`: counts against a slow loop over Transformers' model, planted routers, one and two ranks,
and what it refuses."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from olmoe_train.cli.analyze import analyze, main
from olmoe_train.cli.analyze_sources import count_errors
from olmoe_train.config.data import DataConfig, MixtureSource
from olmoe_train.config.verbs import AnalyzeConfig
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.reporting.routing_counts import RoutingCounts, count_routing, domain_batches
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared
from tests.support.pair import TINY, make_pair
from tests.support.ranks import run_ranks

SIZES = TINY | {"num_experts": 8, "num_experts_per_tok": 3, "eos_token_id": 0, "initializer_range": 0.3}
CPU = torch.device("cpu")
LENGTH = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `first`, written by Transformers, and `second`; two domains of prepared data."""
    directory = tmp_path_factory.mktemp("analyze")
    for seed, name in enumerate(("first", "second")):
        _, theirs = make_pair(SIZES, seed)
        theirs.save_pretrained(directory / name)
    generator = np.random.default_rng(0)
    for name, low, high in (("code", 2, 40), ("prose", 30, 80)):
        documents = [generator.integers(low, high, length).tolist() for length in (40, 3, 52)]
        write_prepared(directory / name, documents, documents, vocab_size=80)
    return directory


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def config(root: Path, *names: str, **changes: Any) -> AnalyzeConfig:
    mixture = [MixtureSource(name, weight=1) for name in ("code", "prose")]
    data = DataConfig(dir=str(root), mixture=mixture, sequence_length=LENGTH)
    values: dict[str, Any] = {
        "source": [str(root / name) for name in names],
        "data": data,
        "micro_batch_size": 2,
    }
    return AnalyzeConfig(**values | {"min_count": 2, "out": str(root / "out")} | changes)


def counted(model: OlmoeForCausalLM, data: DataConfig, **options: Any) -> RoutingCounts:
    return count_routing(model, domain_batches(data, 2, None, 0, 1), CPU, **options)


def sequences(root: Path, name: str) -> list[list[int]]:
    tokens = np.fromfile(next((root / name / "validation").glob("*0.npy")), "<u2").tolist()
    return [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]


def by_transformers(directory: Path, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """For each layer (experts [T, K], routing weight x 2-norm of their outputs [T, K]); then the predicted
    tokens."""
    model = transformers.OlmoeForCausalLM.from_pretrained(directory).eval()
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: inputs.append(args[0][0]))
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_router_logits=True)
    found = []
    for layer, x_TD, logits_TE in zip(model.model.layers, inputs, output.router_logits, strict=True):
        weights_TK, indices_TK = logits_TE.float().softmax(-1).topk(3)
        experts, norms_TK = layer.mlp.experts, torch.zeros_like(weights_TK)
        for t, chosen in enumerate(indices_TK.tolist()):
            for k, e in enumerate(chosen):
                gate, up = (experts.gate_up_proj[e] @ x_TD[t]).chunk(2)
                norms_TK[t, k] = (experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)).norm()
        found.append((indices_TK, weights_TK * norms_TK))
    return [*found, (output.logits[0].argmax(-1), torch.empty(0))]


def test_counts_of_transformers_model_are_those_of_a_slow_loop(root: Path) -> None:
    mine, other = (OlmoeForCausalLM.from_pretrained(root / name) for name in ("first", "second"))
    counts = counted(mine, config(root).data, reference=other)
    slow: Counter[tuple[Any, ...]] = Counter()
    norms_LE = torch.zeros(2, 8, dtype=torch.float64)
    for domain, name in enumerate(("code", "prose")):
        for ids in sequences(root, name):
            *layers, (predicted, _) = by_transformers(root / "first", ids)
            *reference, _ = by_transformers(root / "second", ids)
            for layer, (indices_TK, weighted_TK) in enumerate(layers):
                theirs = reference[layer][0].tolist()
                for t, chosen in enumerate(indices_TK.tolist()):
                    norms_LE[layer].index_add_(0, indices_TK[t], weighted_TK[t].double())
                    following = ids[t + 1 : t + 2]
                    for k in (1, 3):
                        slow["shared", k, layer] += len({*chosen[:k]} & {*theirs[t][:k]})
                        for e in chosen[:k]:
                            slow["domain", k, domain, layer, e] += 1
                            slow["input", k, layer, ids[t], e] += 1
                            slow["predicted", k, layer, int(predicted[t]), e] += 1
                            slow.update(("next", k, layer, token, e) for token in following)
                    slow.update(("pair", layer, i, j) for i in chosen for j in chosen)
                    for i, j in pairwise(chosen):
                        slow.update([("neighbor", layer, i, j), ("neighbor", layer, j, i)])
    found: dict[tuple[Any, ...], int] = {}
    for k in (1, 3):
        found |= _cells(counts.by_domain[k], "domain", k) | _cells(counts.shared[k], "shared", k)
        for kind in ("input", "predicted", "next"):
            found |= _cells(counts.by_token[kind, k], kind, k)
    found |= _cells(counts.pairs_LEE, "pair") | _cells(counts.neighbors_LEE, "neighbor")
    assert found == {key: count for key, count in slow.items() if count}
    torch.testing.assert_close(counts.weighted_norms_LE, norms_LE, rtol=1e-5, atol=0)


def _cells(tensor: Tensor, *name: object) -> dict[tuple[Any, ...], int]:
    """(name, index...) -> value of each element that is not 0."""
    return {(*name, *at): int(tensor[tuple(at)]) for at in tensor.nonzero().tolist()}


def test_planted_routers(root: Path, tmp_path: Path) -> None:
    """A router of the token id, and one of the domain."""
    model = OlmoeForCausalLM.from_pretrained(root / "first")
    for layer in model.decoder_layers:  # the residual stream stays the embedding
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.experts.down_proj.data.zero_()
    counts = counted(model, config(root).data)
    occurrences_V = counts.occurrences["input"]
    for k in (1, 3):
        highest_LV = counts.by_token["input", k].amax(-1)
        assert torch.equal(highest_LV, occurrences_V.expand_as(highest_LV).int())  # 100% of each token id
        assert torch.equal(counts.by_token["input", k].sum(-1), k * highest_LV)

    for name, tokens in (("low", range(2, 9)), ("high", range(50, 60))):
        write_prepared(tmp_path / name, [[2]], [list(tokens)], vocab_size=80)
    embedding = model.model.embed_tokens.weight.data.zero_()
    embedding[:40, 0] = embedding[40:, 1] = 1.0
    for layer in model.decoder_layers:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.weight.data[:3, 0] = layer.mlp.gate.weight.data[3:6, 1] = torch.tensor([3.0, 2, 1])
    mixture = [MixtureSource(name, weight=1) for name in ("low", "high")]
    planted = counted(model, DataConfig(dir=str(tmp_path), mixture=mixture, sequence_length=11))
    low, high = planted.by_domain[3].tolist()
    assert low == [[8, 8, 8, 0, 0, 0, 0, 0]] * 2
    assert high == [[1, 1, 1, 10, 10, 10, 0, 0]] * 2  # the end of the document is of the low tokens


def analyze_and_sum(cfg: AnalyzeConfig, model: Path) -> list[Tensor]:
    """Write the analysis, and return the sums that are not integers. The files have six decimals of them."""
    analyze(cfg, CPU)
    return fp64_sums(cfg, model)


def fp64_sums(cfg: AnalyzeConfig, model: Path) -> list[Tensor]:
    batches_N = domain_batches(cfg.data, 2, None, dist.get_rank(), dist.get_world_size())
    counts = count_routing(OlmoeForCausalLM.from_pretrained(model), batches_N, CPU)
    return [counts.gates_LE, counts.weighted_norms_LE]


@pytest.mark.ranks
def test_files_of_two_ranks_are_those_of_one(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(root, "first", "second", out=str(root / "one"))
    main(cfg)
    assert "saturation" in capsys.readouterr().out
    init_distributed("cpu")
    sums = fp64_sums(cfg, root / "first")
    for found in run_ranks(2, analyze_and_sum, replace(cfg, out=str(root / "two")), root / "first"):
        assert all(torch.equal(a, b) for a, b in zip(found, sums, strict=True))
    files = sorted(path.name for path in (root / "one").iterdir())
    assert [path.name for path in sorted((root / "two").iterdir())] == files
    for name in files:
        assert (root / "one" / name).read_bytes() == (root / "two" / name).read_bytes(), name
        if name.endswith(".svg"):
            ElementTree.parse(root / "one" / name)
    record = json.loads((root / "one" / "analysis.json").read_text())
    assert record["format"] == "olmoe-train router analysis 1"
    assert [entry["source"] for entry in record["saturation"]] == [0, 0]
    assert all(0 < value < 1 for entry in record["saturation"] for value in entry["by_layer"])
    assert record["tokens"] == sum(record["data"]["domains"].values()) == 196
    for entry in record["domains"]:
        assert [sum(shares) for shares in entry["by_layer"]] == pytest.approx([entry["k"]] * 2, abs=1e-5)
    with (root / "one" / "domains.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 * 8  # sources, domains, k, layers, experts
    assert math.isclose(sum(float(row["share"]) for row in rows), 2 * 2 * 2 * (1 + 3), abs_tol=1e-4)
    main(replace(cfg, source=[str(root / "second")], vocabulary=False))  # one model, over the earlier files
    record = json.loads((root / "one" / "analysis.json").read_text())
    assert (record["saturation"], record["vocabulary"]) == ([], [])
    left = {path.stem for path in (root / "one").iterdir()}
    assert left == {"analysis", "coactivation", "domains", "domains_top_1", "importance"}


def test_more_tokens_than_the_counts_hold(root: Path) -> None:
    cfg = config(root, "first")
    (error,) = count_errors(2**31, cfg)
    assert "has 2,147,483,648 validation tokens to analyze" in error
    assert count_errors(2**31, replace(cfg, max_sequences=1000)) == []
    assert count_errors(2**31, replace(cfg, vocabulary=False)) == []


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ((), {}, r"source=\[\] names no model: give a model, or a list of models such as"),
        (("first", "nothing"), {}, "nothing: neither an HF directory"),
        (("first@7",), {}, "step=7: source=.*first is not a run directory and has no steps"),
        (("first@all",), {}, "first has no complete checkpoint"),
        (("first", "first"), {}, "first is there twice"),
        (("first", "wider"), {}, "wider: has num_experts=4, and .*first has 8"),
        (("dense",), {}, "dense: is a dense model, which has no router"),
        (("first",), {"out": None}, "out: the reference .*first is not a run, .* give out=DIR"),
        (("first",), {"out": "code"}, r"out=.*code: holds files, but no analysis\.json"),
        (
            ("first",),
            {"micro_batch_size": 0, "min_count": -1},
            "micro_batch_size=0: must be .*\n.*min_count=-1",
        ),
        (("first",), {"dir": "no_validation"}, "no_validation: has no validation split"),
        (("first",), {"dir": "nowhere"}, "nowhere: no prepared data there"),
        (("first",), {"sequence_length": 65}, "sequence_length=65 is greater than the model's"),
    ],
)
def test_wrong_values(root: Path, names: tuple[str, ...], changes: dict[str, Any], message: str) -> None:
    if not (root / "dense").exists():
        for name, sizes in (
            ("wider", {"num_experts": 4}),
            ("dense", {"num_experts": 1, "num_experts_per_tok": 1}),
        ):
            make_pair(SIZES | sizes)[0].save_pretrained(root / name)
        write_prepared(root / "no_validation", [[3, 4]], vocab_size=80)
    cfg = config(root, *names)
    if "dir" in changes:
        cfg = replace(cfg, data=DataConfig(dir=str(root / changes["dir"]), sequence_length=LENGTH))
    if "sequence_length" in changes:
        cfg = replace(cfg, data=replace(cfg.data, sequence_length=changes["sequence_length"]))
    options = {key: changes[key] for key in ("micro_batch_size", "min_count", "out") if key in changes}
    if options.get("out"):
        options["out"] = str(root / options["out"])
    with pytest.raises(UserError, match=message):
        main(replace(cfg, **options))

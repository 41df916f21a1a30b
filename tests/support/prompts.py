"""Small prepared prompts with answers, whose tokens are the words t0, t1, ...; and a tiny base model for
them."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from olmoe_train.config.model import olmoe_config
from olmoe_train.data.manifest import TOKENIZER, Targets, read_manifest, write_manifest
from olmoe_train.model import OlmoeForCausalLM
from tests.support.data import add_loss_mask, write_prepared
from tests.support.runs import TINY, compose

VOCABULARY, LENGTH = 258, 32
REWARD = '''
import re


def even(completion, answer):
    """Share of the tokens with an even number."""
    numbers = [int(number) for number in re.findall("t([0-9]+)", completion)]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))
'''


def write_prompts(directory: Path, train: int = 20, validation: int = 4) -> None:
    """Write data/, base/ (a model) and rewards.py."""
    draw = random.Random(0)
    documents, masks = [], []
    for _ in range(train + validation):
        prompt = [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, 6))]
        documents.append([*prompt, draw.randrange(2, VOCABULARY)])
        masks.append([0] * len(prompt) + [1, 0])
    data = directory / "data"
    write_prepared(data, documents[:train], documents[train:], vocab_size=VOCABULARY)
    add_word_tokenizer(data, VOCABULARY)
    for name, some in (("train", masks[:train]), ("validation", masks[train:])):
        add_loss_mask(data, name, [bit for mask in some for bit in mask])
    targets = Targets(train + validation, 0, 0, train + validation)
    write_manifest(data, replace(read_manifest(data), targets=targets))
    (directory / "rewards.py").write_text(REWARD)
    config = olmoe_config(compose(TINY | {"data.dir": data}).model)
    torch.manual_seed(0)
    OlmoeForCausalLM(config).save_pretrained(directory / "base")


def add_word_tokenizer(data: Path, vocabulary: int) -> None:
    """Give prepared data a tokenizer whose words are t0, t1, ..., by their ids."""
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(vocabulary)}, unk_token="t2"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    words.save(str(data / TOKENIZER / "tokenizer.json"))
    tokenizer = (data / TOKENIZER / "tokenizer.json").read_bytes()
    text = (data / "manifest.json").read_text()
    old = hashlib.sha256(b"{}").hexdigest()
    (data / "manifest.json").write_text(text.replace(old, hashlib.sha256(tokenizer).hexdigest()))


def grpo_values(directory: Path) -> dict[str, Any]:
    """Values by key of a run on what `write_prompts` wrote."""
    values = {key: value for key, value in TINY.items() if not key.startswith("model.")}
    return values | {
        "model.init_from": directory / "base",
        "data.dir": directory / "data",
        "data.sequence_length": LENGTH,
        "data.packing": "best_fit",
        "data.mask_documents": True,
        "objective": "grpo",
        "objective.group_size": 4,
        "objective.max_new_tokens": 8,
        "objective.reward": "python",
        "objective.reward_function": f"{directory / 'rewards.py'}:even",
        "trainer.global_batch_size": 4,
        "trainer.micro_batch_size": 4,
    }

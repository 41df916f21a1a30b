"""Bytes of each token id, and bits per byte counted by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.token_bytes import _why_inexact, token_bytes_or_reason
from olmoe_train.evaluation.perplexity import evaluate_data
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.data import read_documents
from tests.support.prepared_texts import TEXTS, prepare_texts
from tests.support.sizes import SIZES


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_texts(tmp_path_factory.mktemp("texts") / "data")


def test_the_bytes_of_the_tokens_are_those_of_the_text(prepared: Path) -> None:
    bytes_V, _ = token_bytes_or_reason(DataConfig(dir=str(prepared)))
    assert bytes_V is not None
    counted = sorted(int(bytes_V[document].sum()) for document in read_documents(prepared, "validation"))
    assert counted == sorted(len(text.encode()) * 3 for text in TEXTS)
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    assert [int(bytes_V[token]) for token in tokenizer.encode("é").ids] in ([2], [1, 1])
    assert bytes_V.max() > 2
    assert bytes_V[:2].tolist() == [0, 0], "end of text and padding"


def test_bits_per_byte_by_hand(prepared: Path) -> None:
    """One document, whose first token is no target; its end is a target of 0 bytes."""
    (prepared.parent / "one").mkdir()
    one = prepare_texts(prepared.parent / "one" / "data", TEXTS[:1], tokenizer=prepared / "tokenizer")
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"vocab_size": 320, "max_position_embeddings": 128}))
    data = DataConfig(dir=str(one), sequence_length=128)
    result = evaluate_data(model, data, EvaluationConfig(), torch.device("cpu"))["validation"]

    (ids,) = read_documents(one, "validation")
    log_p = model.eval()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    nats = -sum(log_p[at, token].item() for at, token in enumerate(ids[1:]))
    first = Tokenizer.from_file(str(one / "tokenizer" / "tokenizer.json")).decode(ids[:1])
    count = len((TEXTS[0] * 3).encode()) - len(first.encode())
    assert result.bytes == count
    assert result.tokens == len(ids) - 1
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / count, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"type": "WordPiece"}}, "its model is WordPiece"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer Lowercase changes the text"),
        ({"normalizer": {"type": "NFC"}}, None),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "its BPE is not byte-level"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "adds a space"),
    ],
)
def test_tokenizers_that_do_not_say(prepared: Path, change: dict[str, Any], reason: str | None) -> None:
    content = json.loads((prepared / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")) | change
    assert (found := _why_inexact(content)) is reason or (found and reason and reason in found)

"""The evaluation loss: one mean over all target tokens, however they are batched; and what data it
refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.cli.evaluate import main
from olmoe_train.cli.model_sources import check_data
from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig, MixtureSource
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.config.verbs import EvaluateConfig
from olmoe_train.data.loader import build_eval_batches
from olmoe_train.data.manifest import read_manifest
from olmoe_train.evaluation.perplexity import Evaluation, evaluate_data, evaluate_model
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from tests.support.data import EOS, write_prepared

CPU = torch.device("cpu")
VALIDATION = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]  # 16 tokens with their ends


def make() -> OlmoeForCausalLM:
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            attention_dropout=0.5,
            initializer_range=1.0,
            eos_token_id=EOS,
        )
    )


def prepared(directory: Path) -> Path:
    return write_prepared(directory, [[3, 4]], VALIDATION, vocab_size=20)


def by_hand(model: OlmoeForCausalLM, ids: list[int], length: int) -> tuple[float, int]:
    """Mean loss over windows of `length` tokens, each alone, and the number of its targets."""
    losses: list[Tensor] = []
    for start in range(0, len(ids), length):
        window = torch.tensor([ids[start : start + length]])
        logits = model.eval()(window).logits[0, :-1]
        losses.append(F.cross_entropy(logits, window[0, 1:], reduction="none"))
    every = torch.cat(losses)
    return every.mean().item(), len(every)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize("length", [5, 16, 20])
def test_one_mean_over_all_targets(tmp_path: Path, length: int, micro_batch_size: int) -> None:
    model = make()
    data = DataConfig(dir=str(prepared(tmp_path / "data")), sequence_length=length)
    got = evaluate_model(model, build_eval_batches(data, 0, 1, micro_batch_size), CPU)
    ids = [token for document in VALIDATION for token in [*document, EOS]]
    loss, targets = by_hand(model, ids, length)
    assert got.tokens == targets
    assert got.loss == pytest.approx(loss, rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(loss), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_eval_meanwhile_and_restored(training: bool) -> None:
    model = make().train(training)
    ids = torch.arange(2, 20)[None]
    losses = {
        evaluate_model(model, [{"input_ids": ids, "targets": ids.roll(-1, 1)}], CPU).loss for _ in range(2)
    }
    assert len(losses) == 1, "dropout was on"
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_source_of_a_mixture_and_all_their_tokens_together(tmp_path: Path) -> None:
    model = make()
    documents = {"a": VALIDATION, "b": [[6, 7, 8]] * 5, "train_only": []}
    for name, validation in documents.items():
        write_prepared(tmp_path / name, [[3, 4]], validation, vocab_size=20)
    mixture = [MixtureSource(name, weight=1) for name in documents]
    data = DataConfig(dir=str(tmp_path), mixture=mixture, sequence_length=5)
    results = evaluate_data(model, data, EvaluationConfig(micro_batch_size=2), CPU)
    assert list(results) == ["a", "b", "validation"]
    for name in "ab":
        ids = [token for document in documents[name] for token in [*document, EOS]]
        loss, targets = by_hand(model, ids, 5)
        assert results[name].loss == pytest.approx(loss, rel=1e-6)
        assert results[name].tokens == targets
    a, b, whole = results.values()
    assert whole.tokens == a.tokens + b.tokens
    assert whole.loss * whole.tokens == pytest.approx(a.loss * a.tokens + b.loss * b.tokens)


def test_documents_by_themselves(tmp_path: Path) -> None:
    """Packed and masked, the loss is that of each document alone, whatever shares its sequence."""
    model = make()
    data = DataConfig(
        dir=str(prepared(tmp_path / "data")),
        sequence_length=13,
        packing=Packing.best_fit,
        mask_documents=True,
    )
    result = evaluate_data(model, data, EvaluationConfig(micro_batch_size=2), CPU)["validation"]
    parts = [by_hand(model, [*document, EOS], 13) for document in VALIDATION]
    assert result.tokens == sum(targets for _, targets in parts) == 13
    assert result.loss == pytest.approx(sum(loss * targets for loss, targets in parts) / 13, rel=1e-6)


def test_perplexity_of_a_hopeless_loss_is_infinite() -> None:
    assert Evaluation(loss=1e4, tokens=1).perplexity == math.inf


def test_the_verb_prints_loss_perplexity_tokens_and_the_unigram_entropy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "hf")
    directory = prepared(tmp_path / "data")
    data = DataConfig(dir=str(directory), sequence_length=8)
    main(EvaluateConfig([str(tmp_path / "hf")], data, EvaluationConfig(micro_batch_size=2)))
    shown = {line[:17].strip(): line[17:].split()[0] for line in capsys.readouterr().out.splitlines()}
    expected = evaluate_model(model, build_eval_batches(data, 0, 1, 2), CPU)
    assert shown["loss"] == f"{expected.loss:.4f}"
    assert shown["perplexity"] == f"{expected.perplexity:.2f}"
    assert shown["tokens"] == str(expected.tokens)
    entropy = read_manifest(directory).unigram_entropy
    assert ("unigram entropy" in shown) == (entropy is not None)
    if entropy is not None:
        assert shown["unigram entropy"] == f"{entropy:.4f}"


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({"vocab_size": 19}, 8, "token ids up to 19, but the model has only 19 embeddings"),
        ({"eos_token_id": 3}, 8, "end with token 0, but the model's eos_token_id is 3"),
        ({"eos_token_id": None}, 8, "end with token 0, but the model's eos_token_id is None"),
        ({"max_position_embeddings": 4}, 8, "data.sequence_length=8 is greater than"),
    ],
)
def test_data_of_another_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], length: int, message: str
) -> None:
    directory = prepared(tmp_path / "data")
    values = make().config.to_dict() | changes
    data = DataConfig(dir=str(directory), sequence_length=length)
    with pytest.raises(UserError, match=message):
        check_data(OlmoeConfig.from_dict(values), read_manifest(directory), data)


def test_fitting_data_passes(tmp_path: Path) -> None:
    directory = prepared(tmp_path / "data")
    data = DataConfig(dir=str(directory), sequence_length=8)
    for eos in (EOS, [3, EOS]):
        values = make().config.to_dict() | {"eos_token_id": eos}
        check_data(OlmoeConfig.from_dict(values), read_manifest(directory), data)

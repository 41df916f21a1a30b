"""`olmoe experts`: the selection by hand, the sample over ranks, the file, and what is refused."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.cli.experts import main, run
from olmoe_train.config.choices import DataSplit, Relevance
from olmoe_train.config.data import DataConfig
from olmoe_train.config.expert_file import NamedExperts, read_experts
from olmoe_train.config.surgery import ExpertsConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.roles import ParameterRole
from olmoe_train.reporting.expert_selection import relevance, smallest_sets
from olmoe_train.reporting.routing_counts import zero_counts
from olmoe_train.reporting.routing_sample import training_sample
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared
from tests.support.hf_directories import make

LENGTH = 8
SIZES = {"num_experts": 5, "num_experts_per_tok": 2, "initializer_range": 0.3, "eos_token_id": 0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model, and prepared data: 11 sequences for training, 2 for validation."""
    make(**SIZES).save_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(2, 40, 2 + 11 * LENGTH).tolist()
    write_prepared(tmp_path / "data", [tokens[:50], tokens[50:]], [tokens[:15]], vocab_size=40)
    return tmp_path


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def config(root: Path, **changes: Any) -> ExpertsConfig:
    values: dict[str, Any] = {
        "source": str(root / "model"),
        "data": DataConfig(dir=str(root / "data"), sequence_length=LENGTH),
        "micro_batch_size": 2,
        "max_sequences": 5,
        "out": str(root / "experts.yaml"),
    }
    return ExpertsConfig(**values | changes)


def test_relevance_and_smallest_sets_by_hand() -> None:
    counts = zero_counts(make(num_experts=4, num_experts_per_tok=2), 1, False, False, torch.device("cpu"))
    counts.pairs_LEE[0] = torch.diag(torch.tensor([10, 40, 20, 30]))  # 50 tokens, each with 2 experts
    counts.pairs_LEE[1] = torch.diag(torch.tensor([25, 25, 50, 0]))
    counts.gates_LE[0] = torch.tensor([16.0, 4.0, 10.0, 2.0])  # of 50: not normalized over the top k
    counts.gates_LE[1] = torch.tensor([1.0, 1.0, 2.0, 0.0])
    by_token = relevance(counts, Relevance.token)
    np.testing.assert_allclose(by_token, [[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.5, 0]])
    by_gate = relevance(counts, Relevance.gate)
    np.testing.assert_allclose(by_gate, [[0.5, 0.125, 0.3125, 0.0625], [0.25, 0.25, 0.5, 0]])
    assert smallest_sets(by_token, 0.4) == [[1], [2]]  # 0.4 is reached, not exceeded
    assert smallest_sets(by_token, 0.7) == [[1, 3], [2, 0]]  # 0.4 + 0.3 in fp64 is not 0.7
    assert smallest_sets(by_token, 1.0) == [[1, 3, 2, 0], [2, 0, 1]]  # without the expert that has no token
    assert smallest_sets(by_gate, 0.8) == [[0, 2], [2, 0, 1]]


def test_the_sample_is_the_same_on_two_ranks(root: Path) -> None:
    data = config(root).data

    def rows(ranks: int, sequences: int) -> list[list[int]]:
        """The sequences that count, batch by batch in the order of the ranks."""
        samples = [training_sample(data, sequences, 2, rank, ranks) for rank in range(ranks)]
        batches = [batch for of_round in zip(*samples, strict=True) for batch in of_round]
        return [
            ids.tolist()
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            if mask.all()
        ]

    assert rows(1, 5) == rows(2, 5)
    assert len(rows(1, 5)) == 5
    assert len(rows(2, 1000)) == 11  # one epoch, and no sequence twice
    assert len({tuple(ids) for ids in rows(2, 1000)}) == 11


@pytest.mark.parametrize("split", DataSplit)
def test_the_file_names_the_experts_that_the_sample_chooses(root: Path, split: DataSplit) -> None:
    main(config(root, split=split, p=0.6))
    named = read_experts(root / "experts.yaml", num_layers=2, num_experts=5)
    model = OlmoeForCausalLM.from_pretrained(root / "model")
    tokens = np.fromfile(next((root / "data" / split.value).glob("*0.npy")), "<u2").astype(np.int64)
    sequences = [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]
    if split is DataSplit.train:
        sample = training_sample(config(root).data, 5, 1, 0, 1)
        sequences = [batch["input_ids"][0].numpy() for batch in sample]
    chosen = torch.zeros(2, 5)
    with torch.no_grad():
        for ids in sequences:
            logits = model(torch.from_numpy(ids)[None], output_router_logits=True).router_logits
            for layer, logits_TE in enumerate(logits):
                indices: Tensor = logits_TE.topk(2).indices
                chosen[layer] += torch.bincount(indices.flatten(), minlength=5)
    assert named == NamedExperts(
        {
            layer: tuple(experts)
            for layer, experts in enumerate(smallest_sets((chosen / chosen.sum(1, True)).numpy(), 0.6))
        }
    )
    with pytest.raises(UserError, match="exists already"):
        main(config(root))


def test_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "experts.yaml"
    path.write_text("layers:\n  1: [3, 0]\nalso: [router, norm]\n")
    named = read_experts(path, 2, 5)
    assert named == NamedExperts({1: (3, 0)}, (ParameterRole.router, ParameterRole.norm))
    path.write_text('{"also": ["norm", "router"], "layers": {"1": [0, 3]}}')
    assert read_experts(path, 2, 5).plain_values() == named.plain_values()


def test_what_does_not_fit_is_refused_together(tmp_path: Path) -> None:
    path = tmp_path / "experts.yaml"
    path.write_text("layers: {0: [5], 1: [2, 2], 2: [0], x: [1]}\nalso: [expert_matrix]\nexperts: 3\n")
    with pytest.raises(UserError) as refused:
        read_experts(path, 2, 5)
    assert [line.strip().removeprefix(f"{path}: ") for line in str(refused.value).splitlines()] == [
        "experts: there is no such key; a file of experts has layers and also",
        "also=['expert_matrix']: must be a list of matrix, router, embedding, head, norm, bias",
        "layers.0: 5: the model has the experts 0 to 4",
        "layers.1=[2, 2]: names an expert twice",
        "layers.2: the model has the layers 0 to 1",
        "layers.x: the model has the layers 0 to 1",
    ]
    path.write_text("layers: {}")
    with pytest.raises(UserError, match="must have the experts of each layer"):
        read_experts(path, 2, 5)
    with pytest.raises(UserError, match="there is no such file"):
        read_experts(tmp_path / "absent.yaml", 2, 5)


def test_wrong_options_are_refused(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(num_experts=1, num_experts_per_tok=1, eos_token_id=0).save_pretrained(root / "dense")
    long = DataConfig(dir=str(root / "data"), sequence_length=9999)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"p": 0.0}, "p=0.0: must be above 0"),
        ({"max_sequences": 0}, "max_sequences=0: must be positive"),
        ({"source": str(root / "dense")}, "is a dense model"),
        ({"data": long}, "data.sequence_length=9999"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            main(config(root, **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experts", "source=x", "data.dir=y", "out=z", "p=2"])
        assert run() == 2
    assert capfd.readouterr().err == "error: p=2.0: must be above 0 and at most 1\n"

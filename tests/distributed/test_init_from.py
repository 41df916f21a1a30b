"""model.init_from: an HF directory into a sharded model, each rank reading its own part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import load_into
from olmoe_train.config.choices import Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES
from tests.support.tiny import build, train_step, whole

# 6 over 4 ranks is 2, 2, 2 and nothing; 97 over 4 is 25, 25, 25, 22.
UNEVEN: dict[str, Any] = {"hidden_size": 6, "num_attention_heads": 1, "vocab_size": 97}
TIED: dict[str, Any] = {"tie_word_embeddings": True}


def load(directory: Path, parallel: ParallelConfig, sizes: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    model, optimizer = build(parallel, seed=999, **sizes)
    load_into(model, directory)
    tensors = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return tensors, train_step(model, optimizer, 0)


@pytest.mark.parametrize(
    ("ranks", "parallel", "sizes"),
    [
        (4, ParallelConfig(), UNEVEN),
        (2, ParallelConfig(strategy=Strategy.ddp), TIED),
        (4, ParallelConfig(replicate_size=2), TIED),
    ],
    ids=["fsdp", "ddp", "hsdp"],
)
def test_every_layout_gets_the_stored_weights(
    tmp_path: Path, ranks: int, parallel: ParallelConfig, sizes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    stored = OlmoeForCausalLM(OlmoeConfig(**SIZES | sizes))
    stored.save_pretrained(tmp_path, max_shard_size="2KB")
    loaded, loss = run_ranks(ranks, load, tmp_path, parallel, sizes)[0]
    expected = {name: parameter.detach() for name, parameter in stored.named_parameters()}
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name
    assert loss == pytest.approx(run_ranks(1, load, tmp_path, ParallelConfig(), sizes)[0][1], rel=1e-5)

"""`olmoe prune`: the saliency against a slow loop, what a removed expert changes, Transformers on the result,
and what is refused."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import silu

from olmoe_train.checkpoint.convert.prune import pruned_reader
from olmoe_train.cli.prune import RECORD, main, run
from olmoe_train.config.choices import DataSplit, PruneBy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.surgery import PruneConfig
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.hf.pretrained import load_model
from olmoe_train.reporting.expert_selection import best_experts, removed_shares, saliency
from olmoe_train.reporting.routing_counts import count_routing
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared
from tests.support.pair import TINY, make_pair

LENGTH = 8
SIZES = TINY | {"num_experts": 8, "eos_token_id": 0}
IDS = torch.tensor([[5, 17, 60]])  # 3 tokens, each to 2 of 8 experts: at least 2 experts have none


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and prepared data: 9 sequences for training, 4 for validation."""
    directory = tmp_path_factory.mktemp("prune")
    make_pair(SIZES)[0].save_pretrained(directory / "model")
    tokens = np.random.default_rng(0).integers(2, 80, 13 * LENGTH).tolist()
    write_prepared(directory / "data", [tokens[: 9 * LENGTH - 1]], [tokens[9 * LENGTH : -1]], vocab_size=80)
    return directory


def config(root: Path, out: Path, **changes: Any) -> PruneConfig:
    values: dict[str, Any] = {
        "source": str(root / "model"),
        "data": DataConfig(dir=str(root / "data"), sequence_length=LENGTH),
        "keep": 5,
        "micro_batch_size": 4,
        "out": str(out),
    }
    return PruneConfig(**values | changes)


def router_inputs(model: OlmoeForCausalLM, input_ids: Tensor) -> list[Tensor]:
    """What the routers read, x_TD of each layer."""
    inputs: list[Tensor] = []
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1)))
        for layer in model.decoder_layers
    ]
    model(input_ids)
    for handle in handles:
        handle.remove()
    return inputs


def slow_sums(model: OlmoeForCausalLM, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the definition, token by token: tokens of each expert, sum of routing weight x norm of its output,
    and sum of its probability, [L, E] each."""
    inputs = router_inputs(model, input_ids)
    tokens, norms, probabilities = torch.zeros(3, len(inputs), model.config.num_experts, dtype=torch.float64)
    for index, (layer, x_TD) in enumerate(zip(model.decoder_layers, inputs, strict=True)):
        experts = layer.mlp.experts
        for x_D in x_TD:
            probs_E = (layer.mlp.gate.weight @ x_D).softmax(-1)
            probabilities[index] += probs_E
            chosen = probs_E.argsort(descending=True)[: model.config.num_experts_per_tok].tolist()
            total = sum(probs_E[e] for e in chosen) if model.config.norm_topk_prob else 1.0
            for e in chosen:
                gate, up = (experts.gate_up_proj[e] @ x_D).chunk(2)
                out_D = experts.down_proj[e] @ (silu(gate) * up)
                tokens[index, e] += 1
                norms[index, e] += (probs_E[e] / total * out_D.norm()).item()
    return tokens, norms, probabilities


def pruned(model: OlmoeForCausalLM, kept_LN: list[list[int]]) -> OlmoeForCausalLM:
    weights = dict(model.named_parameters())
    config = OlmoeConfig.from_dict(model.config.to_dict(), num_experts=len(kept_LN[0]))
    return load_model(OlmoeForCausalLM, config, pruned_reader(lambda name: weights[name].detach(), kept_LN))


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@torch.no_grad()
def test_saliency_is_that_of_a_slow_loop(norm_topk_prob: bool) -> None:
    model, _ = make_pair(SIZES | {"norm_topk_prob": norm_topk_prob})
    ids = torch.randint(2, 80, (4, LENGTH))
    batch = {"input_ids": ids, "targets": ids, "attention_mask": torch.ones_like(ids)}
    counts = count_routing(model, [[batch]], torch.device("cpu"), vocabulary=False)
    tokens, norms, probabilities = slow_sums(model, ids)
    np.testing.assert_allclose(saliency(counts, PruneBy.frequency), tokens / 32)
    np.testing.assert_allclose(saliency(counts, PruneBy.reap), norms / tokens.clamp(min=1), rtol=1e-5)
    kept = best_experts(saliency(counts, PruneBy.reap), 5)
    choices_L, mass_L = removed_shares(counts, kept)
    for layer in range(2):
        removed = [expert for expert in range(8) if expert not in kept[layer]]
        assert choices_L[layer] == pytest.approx(tokens[layer, removed].sum().item() / 64)
        assert mass_L[layer] == pytest.approx(probabilities[layer, removed].sum().item() / 32)


def test_best_experts_by_hand() -> None:
    found = best_experts(np.array([[3.0, 1.0, 4.0, 1.0, 5.0], [0.0, 0.0, 2.0, 0.0, 0.0]]), 3)
    assert found == [[0, 2, 4], [0, 1, 2]]


def used_experts(model: OlmoeForCausalLM) -> list[list[int]]:
    """For each layer 6 experts, those that the tokens of IDS choose among them."""
    return best_experts(slow_sums(model, IDS)[0].numpy(), 6)


def change_by_pruning(model: OlmoeForCausalLM) -> float:
    """Greatest change of a logit when experts leave that no token of IDS chooses."""
    before, after = (one(IDS).logits for one in (model, pruned(model, used_experts(model))))
    assert before.std() > 0.5
    return (after - before).abs().max().item()


@torch.no_grad()
def test_an_expert_without_tokens_leaves_no_trace_if_weights_are_normalized() -> None:
    assert change_by_pruning(make_pair(SIZES | {"norm_topk_prob": True})[0]) <= 1e-6


@torch.no_grad()
def test_without_normalization_its_probability_scales_the_others() -> None:
    model, _ = make_pair(SIZES)
    assert change_by_pruning(model) > 1e-3
    kept_LN = used_experts(model)
    x_TD = router_inputs(model, IDS)[0]
    blocks = [one.decoder_layers[0].mlp for one in (model, pruned(model, kept_LN))]
    before_TD, after_TD = (block(x_TD[None])[0][0] for block in blocks)
    mass_T = 1 - blocks[0].gate(x_TD)[1][:, kept_LN[0]].sum(-1)
    assert mass_T.max() > 0.01
    torch.testing.assert_close(after_TD, before_TD / (1 - mass_T[:, None]))


@torch.no_grad()
def test_without_normalization_an_improbable_expert_leaves_no_trace() -> None:
    model, _ = make_pair(SIZES)
    for index, layer in enumerate(model.decoder_layers):
        x_TD = router_inputs(model, IDS)[index]
        row_D = torch.linalg.lstsq(x_TD, torch.full((3, 1), -40.0)).solution[:, 0]  # logits of -40
        layer.mlp.gate.weight[6:] = row_D
    assert used_experts(model) == [[0, 1, 2, 3, 4, 5]] * 2
    assert change_by_pruning(model) <= 1e-6


@torch.no_grad()
def test_transformers_loads_what_is_written(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    main(config(root, out, by=PruneBy.frequency, split=DataSplit.validation))
    record = OmegaConf.to_container(OmegaConf.load(out / RECORD))
    assert isinstance(record, dict)
    tokens = np.fromfile(next((root / "data" / "validation").glob("*0.npy")), "<u2").astype(np.int64)
    ours, theirs = make_pair(SIZES)
    counts_LE = slow_sums(ours, torch.from_numpy(tokens).view(4, LENGTH))[0]
    assert record["layers"] == dict(enumerate(best_experts(counts_LE.numpy(), 5)))

    weights = dict(theirs.state_dict())
    for name in weights:
        if ".mlp." in name:
            weights[name] = weights[name][record["layers"][int(name.split(".")[2])]]
    expected = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZES | {"num_experts": 5}))
    expected.load_state_dict(weights)
    loaded = transformers.OlmoeForCausalLM.from_pretrained(out)
    ids = torch.from_numpy(tokens).view(4, LENGTH)
    assert torch.equal(loaded.eval()(ids).logits, expected.eval()(ids).logits)
    mine = OlmoeForCausalLM.from_pretrained(out)
    torch.testing.assert_close(mine(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    for when, model in (("before", theirs), ("after", loaded)):
        losses = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:])
        assert record["validation_loss"][when] == pytest.approx(losses.item(), rel=1e-5)


def test_what_is_refused(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"keep": 1},
            "keep=1: the model has 8 experts per layer and sends a token to 2 .*; give 2 to 7",
        ),
        ({"keep": 8}, "give 2 to 7"),
        ({"validation_sequences": -1}, "validation_sequences=-1"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            main(config(root, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is not an empty directory"):
        main(config(root, tmp_path / "full"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prune", "source=x", "data.dir=y", "out=z", "keep=2", "by=weight"])
        assert run() == 2
    assert "by" in capfd.readouterr().err

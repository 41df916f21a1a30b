"""Outputs, losses and every gradient against Transformers 5 in float32, over random small configs."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm as TransformersNorm

from olmoe_train.model import OlmoeForCausalLM, OlmoeModel
from olmoe_train.model.norm import OlmoeRMSNorm
from tests.support.pair import ROPES, TINY, make_batch, make_pair, random_config

LOGITS, LOSS, GRADIENT = 2e-4, 1e-5, 1e-4  # max abs, relative, relative to the gradient's norm
# Transformers renamed past_key_values to cache in 5.24, and removes the old name in 5.40.
CACHE_NAMES = ("past_key_values", "cache")
THEIR_CACHE = CACHE_NAMES["cache" in inspect.signature(transformers.OlmoeForCausalLM.forward).parameters]

NAMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped_query": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1},
    "clip_qkv": {"clip_qkv": 0.4},
    "norm_topk_prob": {"norm_topk_prob": True},
    "attention_bias": {"attention_bias": True},
    "tied_head": {"tie_word_embeddings": True},
    "top_1": {"num_experts_per_tok": 1},
    "all_experts": {"num_experts_per_tok": 6},
    "64_experts_top_8": {"num_experts": 64, "num_experts_per_tok": 8},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu2": {"hidden_act": "relu2"},
    **{f"rope_{rope['rope_type']}": {"rope_parameters": rope} for rope in ROPES[1:]},
}
CONFIGS = {name: {**TINY, **changes} for name, changes in NAMED.items()}
CONFIGS |= {f"random_{seed}": random_config(seed) for seed in range(12)}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients(name: str, padding: str) -> None:
    ours, theirs = make_pair(CONFIGS[name], seed=len(name))
    batch = make_batch(len(name), padding)
    got = ours(**batch, output_router_logits=True)
    expected = theirs(**batch, output_router_logits=True)

    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert (got.logits - expected.logits)[real].abs().max() <= LOGITS
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=LOSS)
    assert got.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=LOSS)
    assert len(got.router_logits) == len(expected.router_logits) == CONFIGS[name]["num_hidden_layers"]
    for mine, other in zip(got.router_logits, expected.router_logits, strict=True):
        assert (mine - other)[real.flatten()].abs().max() <= LOGITS

    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", ["plain", "tied_head", "random_0", "random_1"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_training_forward(name: str, padding: str) -> None:
    """The trainer's path (summed loss, chunked head) is Transformers' loss without the auxiliary one."""
    ours, theirs = make_pair(CONFIGS[name])
    batch = make_batch(0, padding)
    targets = (batch["labels"][:, 1:] != -100).sum()
    output = ours.training_forward(**batch)
    expected = theirs(**batch).loss
    assert (output.ce_sum / targets).item() == pytest.approx(expected.item(), rel=LOSS)
    (output.ce_sum / targets).backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


def assert_same_gradients(ours: OlmoeForCausalLM, theirs: transformers.OlmoeForCausalLM) -> None:
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        scale = expected[name].norm()
        assert scale > 1e-7, f"{name}: the test moves nothing there"
        assert (parameter.grad - expected[name]).norm() <= GRADIENT * scale, name


def batch_of(length: int = 9) -> Tensor:
    return make_batch(3, "none", length=length)["input_ids"]


def test_output_hidden_states() -> None:
    ours, theirs = make_pair(TINY)
    got = ours(batch_of(), output_hidden_states=True).hidden_states
    expected = theirs(batch_of(), output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == TINY["num_hidden_layers"] + 1
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=LOGITS)
    assert ours(batch_of()).hidden_states is None


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_output_attentions(padding: str) -> None:
    ours, theirs = make_pair({**TINY, "num_key_value_heads": 2}, attention="eager")
    batch = make_batch(1, padding)
    got, expected = (model(**batch, output_attentions=True) for model in (ours, theirs))
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert len(got.attentions) == len(expected.attentions) == TINY["num_hidden_layers"]
    for mine, other in zip(got.attentions, expected.attentions, strict=True):
        assert mine.shape == other.shape == (3, 4, 11, 11)
        assert (mine - other).transpose(1, 2)[real].abs().max() <= 1e-5
    assert (got.logits - expected.logits)[real].abs().max() <= LOGITS
    assert (got.logits - ours(**batch).logits)[real].abs().max() <= LOGITS
    assert ours(**batch).attentions is None


@pytest.mark.parametrize("keep", [0, 1, 4, torch.tensor([0, 3, 5])], ids=str)
def test_logits_to_keep(keep: int | Tensor) -> None:
    ours, theirs = make_pair(TINY)
    got = ours(batch_of(), logits_to_keep=keep).logits
    expected = theirs(batch_of(), logits_to_keep=keep).logits
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=LOGITS)


def test_inputs_embeds_and_position_ids() -> None:
    ours, theirs = make_pair(TINY)
    embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11]])
    for arguments in [{}, {"position_ids": positions}]:
        got = ours(inputs_embeds=embeds, **arguments).logits
        expected = theirs(inputs_embeds=embeds, **arguments).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("model_class", [OlmoeModel, OlmoeForCausalLM])
def test_exactly_one_of_input_ids_and_inputs_embeds(model_class: Any) -> None:
    ours, _ = make_pair(TINY)
    model = ours.model if model_class is OlmoeModel else ours
    for arguments in [{}, {"input_ids": batch_of(), "inputs_embeds": torch.randn(3, 9, 32)}]:
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize("our_cache", CACHE_NAMES)
@pytest.mark.parametrize("name", ["plain", "grouped_query", "rope_dynamic", "rope_longrope"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_cache_in_pieces(name: str, padding: str, our_cache: str) -> None:
    """Prefill, several tokens, then one at a time: the same logits, keys and values as Transformers."""
    ours, theirs = make_pair(CONFIGS[name])
    batch = make_batch(2, padding)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    mine = other = None
    for start, end in [(0, 5), (5, 8), (8, 9), (9, 10), (10, 11)]:
        seen = {} if mask is None else {"attention_mask": mask[:, :end]}
        got = ours(ids[:, start:end], use_cache=True, **{our_cache: mine}, **seen)
        expected = theirs(ids[:, start:end], use_cache=True, **{THEIR_CACHE: other}, **seen)
        mine, other = got[our_cache], expected[THEIR_CACHE]
        assert (got.logits - expected.logits)[real[:, start:end]].abs().max() <= LOGITS
        assert mine.get_seq_length() == other.get_seq_length() == end
    for layer in range(TINY["num_hidden_layers"]):
        key, value = mine[layer]
        kept = real[:, None, :, None].expand_as(key)
        torch.testing.assert_close(key[kept], other.layers[layer].keys[kept], rtol=0, atol=LOGITS)
        torch.testing.assert_close(value[kept], other.layers[layer].values[kept], rtol=0, atol=LOGITS)


def test_cache_position() -> None:
    """Where the tokens are, for want of position_ids; Transformers 5 is told in position_ids."""
    ours, theirs = make_pair(TINY)
    ids = make_batch(4, "none")["input_ids"]
    positions = (
        torch.arange(ids.shape[1]) * 3 + 20
    )  # shifting all alike would change nothing: RoPE is relative
    expected = theirs(ids, position_ids=positions[None]).logits
    torch.testing.assert_close(ours(ids, cache_position=positions).logits, expected, rtol=0, atol=2e-4)
    assert not torch.allclose(ours(ids).logits, expected, rtol=0, atol=1e-2)


def test_use_cache_off_and_on() -> None:
    ours, theirs = make_pair(TINY)
    for model, names in ((ours, CACHE_NAMES), (theirs, (THEIR_CACHE,)), (ours.model, CACHE_NAMES)):
        for name in names:
            assert getattr(model(batch_of()), name) is not None
            assert getattr(model(batch_of(), use_cache=False), name) is None


def test_both_names_of_the_cache_are_one_and_the_same() -> None:
    ours, _ = make_pair(TINY)
    for model in (ours, ours.model):
        output = model(batch_of())
        assert output.cache is output.past_key_values
        assert output["cache"] is output["past_key_values"]
        assert sum(item is output.cache for item in output.to_tuple()) == 1
        again = model(batch_of(), cache=output.cache)
        assert again.cache is output.cache
        assert again.cache.get_seq_length() == 2 * batch_of().shape[1]
        with pytest.raises(ValueError, match="past_key_values or cache, not both"):
            model(batch_of(), past_key_values=output.cache, cache=output.cache)


def test_return_dict_false() -> None:
    ours, theirs = make_pair(TINY)
    arguments = {
        "input_ids": batch_of(),
        "labels": batch_of(),
        "output_router_logits": True,
        "use_cache": False,
    }
    got, expected = ours(**arguments, return_dict=False), theirs(**arguments, return_dict=False)
    assert isinstance(got, tuple)
    assert len(got) == len(expected)
    for mine, other in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=LOGITS)


def test_base_model() -> None:
    ours, theirs = make_pair(TINY)
    arguments = {"output_router_logits": True, "output_hidden_states": True}
    got, expected = ours.model(batch_of(), **arguments), theirs.model(batch_of(), **arguments)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, rtol=0, atol=LOGITS)
    assert len(got.router_logits) == len(expected.router_logits)
    assert len(got.hidden_states) == len(expected.hidden_states)


def test_config_turns_outputs_on() -> None:
    config = {**TINY, "output_router_logits": True, "output_hidden_states": True, "use_cache": False}
    for model in make_pair(config):
        output = model(batch_of(), labels=batch_of())
        assert output.aux_loss is not None
        assert output.hidden_states is not None
        assert getattr(output, THEIR_CACHE) is None
    for model in make_pair({**TINY, "output_attentions": True}, attention="eager"):
        assert model(batch_of()).attentions is not None
    ours, _ = make_pair({**TINY, "return_dict": False})  # Transformers 5.23 fails on its own tuple here
    assert isinstance(ours(batch_of()), tuple)
    assert isinstance(ours.model(batch_of()), tuple)


def test_attention_dropout_while_training() -> None:
    ours, theirs = make_pair({**TINY, "attention_dropout": 0.5}, attention="eager")
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        outputs.append(model(batch_of(), output_attentions=True).logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=LOGITS)
    assert (outputs[0] - ours.eval()(batch_of()).logits).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_as_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mine, other = OlmoeRMSNorm(64, 1e-5), TransformersNorm(64, 1e-5)
    weight = 1 + torch.randn(64, generator=generator)
    for norm in (mine, other):
        norm.weight.data.copy_(weight)
        norm.to(dtype)
    x = (10 * torch.randn(50, 64, generator=generator)).to(dtype)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-6 if dtype is torch.float32 else 0, atol=0)


def test_same_parameter_names_and_shapes() -> None:
    for changes in [{}, {"attention_bias": True}, {"tie_word_embeddings": True}]:
        mine, other = (
            {name: parameter.shape for name, parameter in model.named_parameters()}
            for model in make_pair({**TINY, **changes})
        )
        assert mine == other

"""`olmoe upcycle` against Transformers: what the dense model computes, its OLMoE computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from olmoe_train.checkpoint.convert.olmo_dense import olmo_model, open_dense_olmo, without_qk_norm
from olmoe_train.checkpoint.convert.streamed_forward import streamed_logits
from olmoe_train.checkpoint.convert.upcycle import tokens_to_compare
from olmoe_train.cli.upcycle import main as upcycle
from olmoe_train.config.choices import Precision, StripPrefix
from olmoe_train.config.verbs import UpcycleConfig
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from tests.parity.test_special_tokens import write_tokenizer
from tests.support.pair import TINY, make_pair

IDS = torch.randint(3, TINY["vocab_size"], (2, 13), generator=torch.Generator().manual_seed(1))
DENSE = TINY | {"num_experts": 1, "num_experts_per_tok": 1}  # an MLP of width 24
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped, biases, clipped": {"num_key_value_heads": 2, "attention_bias": True, "clip_qkv": 0.5},
    "tied, linear rope": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "copies": {"num_experts": 6, "num_experts_per_tok": 2},
    "halves": {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 12},
    "thirds, one copy a token": {"num_experts": 12, "num_experts_per_tok": 3, "intermediate_size": 8},
    "all experts, not normalised": {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": False},
    "dense": {"num_experts": 1, "num_experts_per_tok": 1},
}


def run(source: Path, out: Path, **options: Any) -> transformers.OlmoeForCausalLM:
    """The upcycled model, in Transformers."""
    upcycle(UpcycleConfig(str(source), str(out), **options))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, transformers.OlmoeForCausalLM)
    return model


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# --- a dense model of this package ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_upcycled_computes_what_the_dense_model_does(tmp_path: Path, variant: str, shape: str) -> None:
    ours, theirs = make_pair(DENSE | VARIANTS[variant])
    ours.save_pretrained(tmp_path / "dense")
    found = run(tmp_path / "dense", tmp_path / "moe", **SHAPES[shape])
    assert found.config.num_experts == SHAPES[shape]["num_experts"]
    assert_same_logits(found(IDS).logits, theirs(IDS).logits)
    assert_same_logits(OlmoeForCausalLM.from_pretrained(tmp_path / "moe")(IDS).logits, theirs(IDS).logits)


def test_bf16_copies_are_bit_for_bit(tmp_path: Path) -> None:
    ours, _ = make_pair(DENSE)
    ours.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    found = run(tmp_path / "dense", tmp_path / "moe", **SHAPES["copies"], max_shard_size="20KB")
    assert found.dtype is torch.bfloat16
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 1
    state = ours.state_dict()
    for name, tensor in found.state_dict().items():
        if ".mlp.gate." not in name:
            assert torch.equal(tensor, state[name].expand_as(tensor)), name


@pytest.mark.parametrize(
    "options",
    [{"norm_topk_prob": False}, {"noise_fraction": 0.1}, {"norm_topk_prob": False, "seed": 5}],
    ids=str,
)
def test_what_is_not_equal_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    ours, theirs = make_pair(DENSE)
    ours.save_pretrained(tmp_path / "dense")
    found = run(tmp_path / "dense", tmp_path / "moe", **SHAPES["copies"], **options)
    assert (found(IDS).logits - theirs(IDS).logits).abs().max() > 0.1
    printed, card = capsys.readouterr().out, (tmp_path / "moe" / "README.md").read_text()
    reason = (
        "norm_topk_prob=false multiplies" if "norm_topk_prob" in options else "10% of each copy's weights"
    )
    for text in (printed, card):
        assert "not the dense model's outputs" in text
        assert reason in text


# --- OLMo 1 -----------------------------------------------------------------------------------------------


def make_olmo(directory: Path, **changes: Any) -> transformers.OlmoForCausalLM:
    """With means that LayerNorm takes out and RMSNorm would not, and logits that a detail shows in."""
    names = ("num_experts", "num_experts_per_tok")
    values = {key: value for key, value in (TINY | changes).items() if key not in names}
    theirs = transformers.OlmoForCausalLM(transformers.OlmoConfig(**values)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((noise + 0.5) * parameter.shape[-1] ** -0.5)
    theirs.save_pretrained(directory, max_shard_size="20KB")
    return theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_olmo_is_read_as_transformers_computes_it(tmp_path: Path, variant: str) -> None:
    theirs = make_olmo(tmp_path, **VARIANTS[variant])
    source = open_dense_olmo(tmp_path)
    assert_same_logits(streamed_logits(olmo_model(source.config), source.read, IDS), theirs(IDS).logits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_upcycled_olmo_is_equal_but_for_q_norm_and_k_norm(tmp_path: Path, variant: str, shape: str) -> None:
    theirs = make_olmo(tmp_path / "olmo", **VARIANTS[variant])
    found = run(tmp_path / "olmo", tmp_path / "moe", **SHAPES[shape])
    with_norms = (found(IDS).logits - theirs(IDS).logits).abs().max()
    assert with_norms > 1e-2, "or there is nothing to declare"
    for layer in found.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    assert_same_logits(found(IDS).logits, theirs(IDS).logits)
    ours = without_qk_norm(OlmoeForCausalLM.from_pretrained(tmp_path / "moe"))
    assert_same_logits(ours(IDS).logits, theirs(IDS).logits)


def test_what_older_files_have_besides(tmp_path: Path) -> None:
    """A tied head beside the embedding, a constant of RoPE in every layer, rope_theta outside."""
    theirs = make_olmo(tmp_path / "olmo", tie_word_embeddings=True)
    tensors = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    config = json.loads((tmp_path / "olmo" / "config.json").read_text())
    del config["rope_parameters"]
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
        save_file(tensors, tmp_path / name / "model.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    source = open_dense_olmo(tmp_path / "same")
    assert_same_logits(streamed_logits(olmo_model(source.config), source.read, IDS), theirs(IDS).logits)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        open_dense_olmo(tmp_path / "other")


def test_an_olmo_from_other_hands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prefixes of wrappers, a weight that is not finite, quantization, and a dtype that is not the files'."""
    theirs = make_olmo(tmp_path / "olmo")
    files = tmp_path / "files"
    theirs.config.save_pretrained(files)
    tensors = {f"module.{name}": tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, files / "model.safetensors")
    with pytest.raises(UserError, match=r"names of tensors carry the prefix module\."):
        upcycle(UpcycleConfig(str(files), str(tmp_path / "moe"), 8, 2))
    options = {"num_experts": 4, "num_experts_per_tok": 2, "strip_prefix": StripPrefix.auto}
    found = run(files, tmp_path / "moe", **options)
    expected = run(tmp_path / "olmo", tmp_path / "same", num_experts=4, num_experts_per_tok=2)
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    assert caplog.messages == []

    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    open_dense_olmo(files, strip_prefix=True)
    assert "says float16, and the weights are stored in float32" in caplog.messages[0]
    tensors["module.model.layers.1.mlp.down_proj.weight"][31, 23] = -math.inf
    save_file(tensors, files / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight\[31, 23\] is -inf"):
        run(files, tmp_path / "broken", **options)
    (files / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match=r"has quantization_config \(quant_method fp8\)"):
        run(files, tmp_path / "broken", **options)


def test_q_norm_and_k_norm_have_the_usual_size_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = make_olmo(tmp_path / "olmo")
    found = run(tmp_path / "olmo", tmp_path / "moe", **SHAPES["copies"])
    printed, card = capsys.readouterr().out, (tmp_path / "moe" / "README.md").read_text()
    for text in (printed, card):
        assert "without q_norm and k_norm, the dense model's outputs: in fp32 logits up to" in text
        assert "OLMo 1 has none, and nothing is equal to that" in text

    sizes: dict[str, Tensor] = {}
    for index, layer in enumerate(theirs.model.layers):
        for which in "qk":
            name = f"model.layers.{index}.self_attn.{which}_norm.weight"
            projection = getattr(layer.self_attn, f"{which}_proj")
            projection.register_forward_hook(
                lambda module, inputs, output, name=name: sizes.update({name: output.pow(2).mean(-1).sqrt()})
            )
    theirs(tokens_to_compare(OlmoeConfig(**TINY), None))
    state = found.state_dict()
    for name, of_tokens in sizes.items():
        usual = torch.exp(torch.log(of_tokens).mean())
        torch.testing.assert_close(state[name], usual.expand_as(state[name]), rtol=1e-4, atol=0)
    assert len(sizes) == 4


def test_an_olmo_in_bf16_and_its_tokenizer(tmp_path: Path) -> None:
    make_olmo(tmp_path / "olmo", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(
        tmp_path / "bf16"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    write_tokenizer(tmp_path / "bf16", eos=2, pad=1)
    found = run(tmp_path / "bf16", tmp_path / "moe", **SHAPES["halves"])
    assert found.dtype is torch.bfloat16
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "moe").eos_token_id == 2
    wide = run(tmp_path / "bf16", tmp_path / "wide", **SHAPES["halves"], precision=Precision.fp32)
    for layer in wide.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    assert_same_logits(wide(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama'; what can be upcycled is olmo"),
        ({"num_hidden_layers": 3}, "tensors missing: model.layers.2.mlp.down_proj.weight"),
        ({"num_hidden_layers": 1}, "tensors unexpected: model.layers.1.mlp.down_proj.weight"),
        ({"intermediate_size": 25}, r"with a wrong shape: .*gate_proj.weight is \[24, 32\]"),
        ({"num_attention_heads": 3}, "config.json: invalid OlmoeConfig: hidden_size=32 is not divisible"),
    ],
    ids=str,
)
def test_what_is_no_olmo_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_olmo(tmp_path / "olmo")
    path = tmp_path / "olmo" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        upcycle(UpcycleConfig(str(tmp_path / "olmo"), str(tmp_path / "moe"), 8, 2))
    assert not (tmp_path / "moe").exists()


def test_olmo_2_is_refused_with_the_reason(tmp_path: Path) -> None:
    values = {key: value for key, value in TINY.items() if "experts" not in key}
    theirs = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**values))
    theirs.save_pretrained(tmp_path / "olmo2")
    with pytest.raises(UserError, match=r"norm\(f\(x\)\)(.|\n)*no choice of weights makes them equal"):
        upcycle(UpcycleConfig(str(tmp_path / "olmo2"), str(tmp_path / "moe"), 8, 2))

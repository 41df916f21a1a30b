"""Original OLMo MoE checkpoints (megablocks experts): in, out, and what is refused.

The synthetic ones here are written as OLMo writes them, from formulas of their own: nothing of the code under
test makes or reads them.
"""

import base64
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import load_into, load_stored_model, open_stored_model
from olmoe_train.cli.export import main as export
from olmoe_train.config.choices import ExportFormat, Precision
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from tests.support.pair import TINY, make_pair

V, D, WIDTH, E, K, HEADS, KV_HEADS, LAYERS = 80, 32, 24, 6, 2, 4, 2, 2
# As allenai/OLMoE/configs and a saved config.yaml have it, sizes apart.
SECTION: dict[str, Any] = {
    "d_model": D,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "n_layers": LAYERS,
    "mlp_ratio": 4,
    "mlp_hidden_size": 2 * WIDTH,
    "weight_tying": False,
    "alibi": False,
    "rope": True,
    "flash_attention": True,
    "attention_dropout": 0.0,
    "attention_layer_norm": True,
    "include_bias": False,
    "block_type": "moe",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "activation_type": "swiglu",
    "max_sequence_length": 64,
    "vocab_size": 77,
    "embedding_size": V,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "init_std": 0.02,
    "moe_top_k": K,
    "moe_num_experts": E,
    "moe_dropless": True,
    "moe_zloss_weight": 0.001,
    "moe_loss_weight": 0.01,
}
KV_WIDTH = KV_HEADS * D // HEADS


def olmo_tensors(tied: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    tensors = {"transformer.wte.weight": draw(V, D), "transformer.ln_f.weight": 1 + draw(D)}
    for block in (f"transformer.blocks.{layer}" for layer in range(LAYERS)):
        tensors |= {
            f"{block}.k_norm.weight": 1 + draw(KV_WIDTH),
            f"{block}.q_norm.weight": 1 + draw(D),
            f"{block}.attn_out.weight": draw(D, D),
            f"{block}.ffn.experts.mlp.w1": draw(E * WIDTH, D),
            f"{block}.ffn.experts.mlp.w2": draw(E * WIDTH, D),
            f"{block}.ffn.experts.mlp.v1": draw(E * WIDTH, D),
            f"{block}.ffn.router.layer.weight": draw(E, D),
            f"{block}.attn_norm.weight": 1 + draw(D),
            f"{block}.ff_norm.weight": 1 + draw(D),
            f"{block}.att_proj.weight": draw(D + 2 * KV_WIDTH, D),
        }
    return tensors if tied else tensors | {"transformer.ff_out.weight": draw(V, D)}


def olmo_key(name: str) -> str:
    """olmo/safetensors_util.py: base64 of a pickled ((name,), is the value pickled)."""
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode("ascii")


def write_olmo(
    directory: Path, kind: str = "safetensors", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    directory.mkdir()
    section = SECTION | changes
    (directory / "config.yaml").write_text(yaml.safe_dump({"run_name": "${oc.env:X}", "model": section}))
    tensors = {name: tensor.to(dtype) for name, tensor in olmo_tensors(section["weight_tying"]).items()}
    if kind == "pt":
        torch.save(tensors, directory / "model.pt")
    else:
        keyed = {olmo_key(name) if kind == "safetensors" else name: t for name, t in tensors.items()}
        save_file(keyed, directory / "model.safetensors")
    return directory


def olmo_logits(tensors: dict[str, Tensor], ids_S: Tensor) -> Tensor:
    """OLMo's MoE block on one sequence, written from its definition: fused qkv, norms over the whole
    projection, rotation of halves, megablocks' GLU experts (silu(x w1.T) * (x v1.T)) w2."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    length, width = len(ids_S), D // HEADS
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def heads(x: Tensor, rotate: bool) -> Tensor:
        x = x.view(length, -1, width).transpose(0, 1)
        halves = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
        x = x * cos + halves * sin if rotate else x
        return x.repeat_interleave(HEADS // len(x), 0)

    x = tensors["transformer.wte.weight"][ids_S]
    for block in (f"transformer.blocks.{layer}." for layer in range(LAYERS)):
        part = {name.removeprefix(block): t for name, t in tensors.items() if name.startswith(block)}
        q, k, v = (norm(x, part["attn_norm.weight"]) @ part["att_proj.weight"].T).split(
            [D, KV_WIDTH, KV_WIDTH], -1
        )
        q, k = norm(q, part["q_norm.weight"]), norm(k, part["k_norm.weight"])
        scores = heads(q, True) @ heads(k, True).transpose(1, 2) / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ heads(v, False)).transpose(0, 1).reshape(length, D)
        x = x + mixed @ part["attn_out.weight"].T
        h = norm(x, part["ff_norm.weight"])
        weights, chosen = (h @ part["ffn.router.layer.weight"].T).softmax(-1).topk(K)
        out = torch.zeros_like(h)
        for token in range(length):
            for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
                rows = slice(expert * WIDTH, (expert + 1) * WIDTH)
                w1, v1, w2 = (part[f"ffn.experts.mlp.{name}"][rows] for name in ("w1", "v1", "w2"))
                out[token] += weight * ((F.silu(h[token] @ w1.T) * (h[token] @ v1.T)) @ w2)
        x = x + out
    head = tensors.get("transformer.ff_out.weight", tensors["transformer.wte.weight"])
    return norm(x, tensors["transformer.ln_f.weight"]) @ head.T


IDS = torch.randint(3, V, (1, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["safetensors", "plain", "pt"])
def test_import_computes_what_olmo_computes(tmp_path: Path, kind: str, tied: bool) -> None:
    source = write_olmo(tmp_path / "olmo", kind, weight_tying=tied)
    export(ExportConfig(str(source), out=str(tmp_path / "hf"), trust_pickle=kind == "pt"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert isinstance(theirs, transformers.OlmoeForCausalLM)
    expected = olmo_logits(olmo_tensors(tied), IDS[0])
    torch.testing.assert_close(theirs(IDS).logits[0], expected, rtol=1e-4, atol=1e-5)
    ours, _ = load_stored_model(str(source), torch.device("cpu"), trust_pickle=kind == "pt")
    torch.testing.assert_close(ours(IDS).logits[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours(IDS).logits, OlmoeForCausalLM.from_pretrained(tmp_path / "hf")(IDS).logits)


def test_training_starts_from_an_olmo_checkpoint(tmp_path: Path) -> None:
    source = write_olmo(tmp_path / "olmo")
    model = OlmoeForCausalLM(open_stored_model(source).config).eval()
    load_into(model, source)
    expected = olmo_logits(olmo_tensors(tied=False), IDS[0])
    torch.testing.assert_close(model(IDS).logits[0], expected, rtol=1e-4, atol=1e-5)


def test_shards_are_not_for_olmo_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_olmo(tmp_path / "olmo")
    cfg = ExportConfig(str(source), out=str(tmp_path / "a"), format=ExportFormat.olmo)
    export(cfg)
    assert "warning" not in capsys.readouterr().out
    export(replace(cfg, out=str(tmp_path / "b"), max_shard_size="20KB"))
    assert "max_shard_size=20KB has no effect: format=olmo writes a single file" in capsys.readouterr().out
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_there_and_back_is_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_olmo(tmp_path / "olmo", dtype=dtype)
    export(ExportConfig(str(source), out=str(tmp_path / "hf"), max_shard_size="20KB"))
    export(ExportConfig(str(tmp_path / "hf"), out=str(tmp_path / "back"), format=ExportFormat.olmo))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("olmo", "back"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype == dtype
        assert torch.equal(tensor, second[key]), key
    written = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())["model"]
    same = SECTION.keys() & written.keys() - {"vocab_size"}  # only the padded size travels
    assert {key: written[key] for key in same} == {key: SECTION[key] for key in same}
    assert len(same) > 20


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}], ids=str)
def test_transformers_to_olmo_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    _, theirs = make_pair(TINY | changes)
    theirs.save_pretrained(tmp_path / "hf")
    export(ExportConfig(str(tmp_path / "hf"), out=str(tmp_path / "olmo"), format=ExportFormat.olmo))
    export(ExportConfig(str(tmp_path / "olmo"), out=str(tmp_path / "again")))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_an_export_is_not_repeated_and_nothing_else_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_olmo(tmp_path / "olmo")
    cfg = ExportConfig(str(source), out=str(tmp_path / "out"), format=ExportFormat.olmo)
    export(cfg)
    export(cfg)
    assert "already exported, nothing to do" in capsys.readouterr().out
    export(ExportConfig(str(source), out=str(tmp_path / "hf"), precision=Precision.bf16))
    assert open_stored_model(tmp_path / "hf").config.dtype is torch.bfloat16
    with pytest.raises(UserError, match="does not hold this export"):
        export(ExportConfig(str(source), out=str(tmp_path / "hf"), format=ExportFormat.olmo))
    with pytest.raises(UserError, match=r"out is required: set out=DIR"):
        export(ExportConfig(str(source)))
    with pytest.raises(UserError, match=r"step=3: .* has no steps"):
        export(ExportConfig(str(source), step="3", out=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_type": "sequential"}, "block_type is 'sequential', an OLMoE has 'moe'"),
        ({"attention_layer_norm": False}, "attention_layer_norm is False"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"norm_after": True, "moe_shared_expert": True}, "moe_shared_expert is True"),
        ({"d_model": "wide"}, "not the configuration of an OLMo model|must be an integer"),
        ({"n_heads": 3}, "not divisible by num_attention_heads=3"),
        (
            {"moe_num_experts": 5},
            "tensors with a wrong shape: .*w1 is .144, 32., the configuration says .120, 32.",
        ),
        ({"n_layers": 1}, "tensors unexpected: transformer.blocks.1.att_proj.weight"),
        ({"n_layers": 3}, "tensors missing: transformer.blocks.2.att_proj.weight"),
    ],
    ids=str,
)
def test_other_models_of_olmo_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_stored_model(write_olmo(tmp_path / "olmo", **changes))


@pytest.mark.parametrize("encoded", [False, True], ids=["plain", "encoded"])
def test_prefixes_of_wrappers_are_named_and_taken_off(tmp_path: Path, encoded: bool) -> None:
    source = write_olmo(tmp_path / "olmo")
    expected = open_stored_model(source).read("model.layers.1.mlp.experts.down_proj").clone()
    tensors = {f"module.{name}": tensor for name, tensor in olmo_tensors().items()}
    tensors = {olmo_key(name) if encoded else name: tensor for name, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"carry the prefix module\. .* module\.transformer\."):
        open_stored_model(source)
    stored = open_stored_model(source, strip_prefix=True)
    assert torch.equal(stored.read("model.layers.1.mlp.experts.down_proj"), expected)


def test_a_weight_that_is_not_finite_is_named_as_in_olmo(tmp_path: Path) -> None:
    source = write_olmo(tmp_path / "olmo", "plain")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.blocks.1.ffn.experts.mlp.v1"][30, 7] = math.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"transformer\.blocks\.1\.ffn\.experts\.mlp\.v1\[30, 7\] is nan"):
        export(ExportConfig(str(source), out=str(tmp_path / "hf")))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": True},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_what_olmo_cannot_express_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    ours, _ = make_pair(TINY | changes)
    ours.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=f"OLMo's MoE does not support {next(iter(changes))}"):
        export(ExportConfig(str(tmp_path / "hf"), out=str(tmp_path / "olmo"), format=ExportFormat.olmo))
    assert not (tmp_path / "olmo").exists()


def test_a_key_that_is_a_hostile_pickle_is_only_a_name(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "mark",)

    source = write_olmo(tmp_path / "olmo")
    tensors = load_file(source / "model.safetensors")
    content = pickle.dumps(((Evil(),), False))
    pickle.loads(content)  # noqa: S301  it does run where it is unpickled
    (tmp_path / "mark").rmdir()
    key = base64.urlsafe_b64encode(content).decode()
    save_file(tensors | {key: torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(UserError, match="tensors unexpected"):
        open_stored_model(source)
    assert not (tmp_path / "mark").exists()

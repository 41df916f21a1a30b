"""HF directories that are damaged, hostile or another model's: what is refused, and the one way into a
pickle."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import load_into
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from tests.support.hf_directories import assert_same, edit_json, edit_tensors, make, tensors_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "hf", max_shard_size="2KB")
    return tmp_path / "hf"


def test_missing_unexpected_and_misshaped_tensors_are_named_together(saved: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(6, 8)
        tensors["lm_head.weight"] = torch.zeros(41, 8)

    edit_tensors(saved, edit)
    with pytest.raises(UserError) as caught:
        OlmoeForCausalLM.from_pretrained(saved)
    message = str(caught.value)
    assert "tensors missing: model.layers.1.mlp.experts.2.up_proj.weight" in message
    assert "tensors unexpected: model.layers.1.mlp.experts.3.up_proj.weight" in message
    assert "lm_head.weight is [41, 8], the configuration says [40, 8]" in message


def test_quantised_weights_are_refused(saved: Path) -> None:
    edit_tensors(
        saved, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(40, 8, dtype=torch.int8)})
    )
    with pytest.raises(UserError, match=r"lm_head\.weight is stored as I8"):
        OlmoeForCausalLM.from_pretrained(saved)


def test_long_lists_of_names_are_cut(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    with pytest.raises(UserError, match="and 13 more"):
        OlmoeForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "target", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7, ""]
)
def test_index_entries_outside_the_directory_are_refused(sharded: Path, target: Any) -> None:
    # The file is really there, so that only the rule can refuse it.
    shard = min(sharded.glob("*.safetensors"))
    shutil.copy(shard, sharded.parent / "elsewhere.safetensors")
    (sharded / "sub").mkdir()
    shutil.copy(shard, sharded / "sub" / "model.safetensors")
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.embed_tokens.weight": target}),
    )
    with pytest.raises(UserError, match=r"which is not a .safetensors file beside the index"):
        OlmoeForCausalLM.from_pretrained(sharded)


def test_damaged_indexes_and_files_are_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    kept = index.read_text()
    for content in ["{", "[]", '{"weight_map": 3}', "{}"]:
        index.write_text(content)
        with pytest.raises(UserError, match="not a safetensors index"):
            OlmoeForCausalLM.from_pretrained(sharded)
    index.write_text(kept)
    edit_json(index, lambda content: content["weight_map"].update({"model.phantom": first.name}))
    with pytest.raises(UserError, match=f"model.phantom in {first.name}"):
        OlmoeForCausalLM.from_pretrained(sharded)
    index.write_text(kept)
    second.write_bytes(second.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{second.name}: cannot be read"):
        OlmoeForCausalLM.from_pretrained(sharded)
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name}: cannot be read"):
        OlmoeForCausalLM.from_pretrained(sharded)


def as_pickles(directory: Path, *parts: dict[str, Any]) -> Path:
    """Replace the weights by torch.save files, with an index where there are several."""
    (directory / "model.safetensors").unlink()
    if len(parts) == 1:
        torch.save(parts[0], directory / "pytorch_model.bin")
        return directory
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"pytorch_model-{number:05d}-of-{len(parts):05d}.bin"
        torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def split(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in half} for half in (names[:20], names[20:])]


@pytest.mark.parametrize("count", [1, 2], ids=["single", "sharded"])
def test_pickles_are_read_where_they_are_trusted(saved: Path, count: int) -> None:
    tensors = tensors_of(saved) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    as_pickles(saved, *([tensors] if count == 1 else split(tensors)))
    with pytest.raises(
        UserError, match=r"only in pytorch_model.bin.*, a pickle, .*\n.* set trust_pickle=true"
    ):
        OlmoeForCausalLM.from_pretrained(saved)
    model = OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)
    assert_same(model, make())
    into = make()
    with torch.no_grad():
        into.lm_head.weight.zero_()
    load_into(into, saved, trust_pickle=True)
    assert_same(into, make())
    model.save_pretrained(saved)  # safetensors beside it: these are read from now on
    assert_same(OlmoeForCausalLM.from_pretrained(saved), make())


def test_a_trusted_pickle_builds_tensors_and_nothing_else(saved: Path) -> None:
    mark = saved.parent / "mark"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    as_pickles(saved, tensors_of(saved) | {"evil": Evil()})
    torch.load(saved / "pytorch_model.bin", weights_only=False)
    mark.rmdir()  # it does run where it is unpickled
    with pytest.raises(UserError, match=r"pytorch_model\.bin: contains objects other than tensors"):
        OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)
    assert not mark.exists()


def test_damaged_and_odd_pickles_are_named(saved: Path) -> None:
    tensors = tensors_of(saved)
    as_pickles(saved, tensors)
    file = saved / "pytorch_model.bin"
    for content in ["a list", {"step": 3}]:
        torch.save(content, file)
        with pytest.raises(UserError, match="not a state dict"):
            OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)
    file.write_bytes(b"not even a pickle")
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin: (cannot be read|contains objects other than tensors)"
    ):
        OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)
    file.unlink()
    with pytest.raises(UserError, match="no weights found"):
        OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)
    index = {"weight_map": dict.fromkeys(tensors, "../elsewhere.bin")}
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(tensors, saved.parent / "elsewhere.bin")
    with pytest.raises(UserError, match=r"which is not a .bin file beside the index"):
        OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    make(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(OlmoeForCausalLM.from_pretrained(tmp_path), make(tie_word_embeddings=True))
    edit_tensors(tmp_path, lambda t: [t[name][2].fill_(torch.nan) for name in list(t) if "head" in name])
    with pytest.raises(UserError, match=r"lm_head\.weight\[2, 0\] is nan"):
        OlmoeForCausalLM.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"][2].fill_(1))
    with pytest.raises(UserError, match=r"lm_head.weight differs from the embedding"):
        OlmoeForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_function_are_refused(saved: Path) -> None:
    other = make(norm_topk_prob=True, rope_theta=500.0, eos_token_id=3, attention_dropout=0.1)
    with pytest.raises(UserError) as caught:
        load_into(other, saved)
    message = str(caught.value)
    assert "norm_topk_prob is False there and True in the model" in message
    assert "rope_theta" in message
    assert "eos_token_id" not in message, "training may choose its own special tokens and dropout"
    assert "attention_dropout" not in message

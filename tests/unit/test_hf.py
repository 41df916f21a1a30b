"""HF directories: what is written, what is read back, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmoe_train.checkpoint.hf import (
    holds_model,
    hub_parts,
    load_pretrained,
    plan_shards,
    save_pretrained,
    write_directory,
)
from olmoe_train.checkpoint.hf_files import byte_count
from olmoe_train.errors import UserError
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM, OlmoeModel

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
}


def make(**changes: Any) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**{**SIZES, **changes}))


def assert_same(mine: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = dict(other.named_parameters())
    assert expected.keys() == {name for name, _ in mine.named_parameters()}
    for name, parameter in mine.named_parameters():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name]), name


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_hub_names_and_places() -> None:
    shape = torch.Size([2, 6, 8])
    assert hub_parts("model.layers.5.mlp.experts.gate_up_proj", shape) == {
        "model.layers.5.mlp.experts.0.gate_proj.weight": (0, slice(0, 3)),
        "model.layers.5.mlp.experts.0.up_proj.weight": (0, slice(3, None)),
        "model.layers.5.mlp.experts.1.gate_proj.weight": (1, slice(0, 3)),
        "model.layers.5.mlp.experts.1.up_proj.weight": (1, slice(3, None)),
    }
    assert hub_parts("model.layers.5.mlp.experts.down_proj", shape) == {
        "model.layers.5.mlp.experts.0.down_proj.weight": (0,),
        "model.layers.5.mlp.experts.1.down_proj.weight": (1,),
    }
    assert hub_parts("model.layers.5.mlp.gate.weight", torch.Size([2, 8])) == {
        "model.layers.5.mlp.gate.weight": ()
    }


def test_single_file_has_the_hub_tensors(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = tensors_of(tmp_path / "out")
    # embedding, final norm, head; a layer: 2 norms, 4 projections, 2 q/k norms, router, 3 x 3 expert matrices
    assert len(tensors) == 3 + 2 * (2 + 4 + 2 + 1 + 9)
    block = model.model.layers[1].mlp.experts
    prefix = "model.layers.1.mlp.experts.2"
    assert torch.equal(tensors[f"{prefix}.gate_proj.weight"], block.gate_up_proj[2, :6])
    assert torch.equal(tensors[f"{prefix}.up_proj.weight"], block.gate_up_proj[2, 6:])
    assert torch.equal(tensors[f"{prefix}.down_proj.weight"], block.down_proj[2])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "_from_model_config": True,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["OlmoeForCausalLM"]
    assert written["model_type"] == "olmoe"
    assert written["dtype"] == "float32"


@pytest.mark.parametrize("size", ["5GB", "2KB", 700])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_round_trip(tmp_path: Path, changes: dict[str, Any], size: str | int) -> None:
    model = make(**changes)
    model.save_pretrained(tmp_path / "out", max_shard_size=size)
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(again, model)
    assert not again.training
    assert again.config.dtype is torch.float32
    if model.config.tie_word_embeddings:
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_shards_keep_to_their_size_and_the_index_is_true(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, max_shard_size=700)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    seen = {}
    for file in files:
        tensors = load_file(tmp_path / file)
        # The embedding alone (40 x 8 x 4 bytes) is larger than a shard may be.
        assert sum(t.nbytes for t in tensors.values()) <= 700 or len(tensors) == 1
        seen |= dict.fromkeys(tensors, file)
    assert index["weight_map"] == seen
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path).values())


def test_plan_counts_bytes_of_the_dtype() -> None:
    shapes = {"a": torch.Size([10]), "b": torch.Size([10]), "c": torch.Size([10])}
    names = [
        [[name for name, *_ in shard] for shard in plan_shards(shapes, dtype, 40)]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert names == [[["a"], ["b"], ["c"]], [["a", "b"], ["c"]]]


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5KB", 1500), ("2GiB", 2**31), ("700", 700), (700, 700)],
)
def test_byte_count(text: str | int, bytes_: int) -> None:
    assert byte_count(text) == bytes_


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0GB", "5PB", "five"])
def test_byte_count_refuses(text: str) -> None:
    with pytest.raises(UserError, match="max_shard_size"):
        byte_count(text)


def test_dtype_of_what_is_written_and_read(tmp_path: Path) -> None:
    model = make()
    save_pretrained(model, tmp_path / "bf16", dtype=torch.bfloat16)
    assert {t.dtype for t in tensors_of(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert_same(OlmoeForCausalLM.from_pretrained(tmp_path / "bf16"), make().bfloat16())
    wide = OlmoeForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert_same(wide, make().bfloat16().float())
    assert wide.config.dtype is torch.float32
    model.lm_head.bfloat16()
    with pytest.raises(UserError, match="several dtypes"):
        model.save_pretrained(tmp_path / "mixed")


def test_dtype_is_the_tensors_where_the_config_has_none(tmp_path: Path) -> None:
    save_pretrained(make(), tmp_path, dtype=torch.float16)
    edit_json(
        tmp_path / "config.json", lambda content: [content.pop(key) for key in ("dtype", "torch_dtype")]
    )
    assert OlmoeForCausalLM.from_pretrained(tmp_path).config.dtype is torch.float16


def test_fused_names_are_read_layer_by_layer(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    for name in [name for name in tensors if "layers.0.mlp.experts." in name]:
        del tensors[name]
    experts = model.model.layers[0].mlp.experts
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = experts.gate_up_proj.detach()
    tensors["model.layers.0.mlp.experts.down_proj"] = experts.down_proj.detach()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(OlmoeForCausalLM.from_pretrained(tmp_path), model)


def test_base_model_from_a_whole_one_and_alone(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "whole")
    assert_same(OlmoeModel.from_pretrained(tmp_path / "whole"), model.model)
    model.model.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["OlmoeModel"]
    assert "embed_tokens.weight" in tensors_of(tmp_path / "base")
    assert_same(OlmoeModel.from_pretrained(tmp_path / "base"), model.model)
    with pytest.raises(UserError, match=r"tensors missing: lm_head\.weight"):
        OlmoeForCausalLM.from_pretrained(tmp_path / "base")


def test_unknown_config_fields_survive(tmp_path: Path) -> None:
    make(lab_note="kept").save_pretrained(tmp_path / "a")
    OlmoeForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["lab_note"] == "kept"


def test_writing_reads_one_parameter_at_a_time_and_each_once(tmp_path: Path) -> None:
    model = make()
    parameters = dict(model.named_parameters())
    calls: list[str] = []

    def read(name: str) -> Tensor:
        calls.append(name)
        return parameters[name].detach()

    write_directory(model.config, tmp_path, read, torch.float32, max_shard_size=700)
    assert calls == list(parameters)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        write_directory(make().config, tmp_path / "out", read, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_overwritten_but_may_join_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    make().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert_same(OlmoeForCausalLM.from_pretrained(tmp_path), make())
    with pytest.raises(UserError, match="already holds a model"):
        make().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    (tokenizer / "notes.txt").write_text("not a tokenizer file")
    parameters = dict(make().named_parameters())
    write_directory(
        make().config,
        tmp_path / "out",
        lambda name: parameters[name].detach(),
        torch.float32,
        tokenizer=tokenizer,
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} < names
    assert "notes.txt" not in names


def test_holds_model_compares_config_and_every_bit(tmp_path: Path) -> None:
    model = make()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path)

    def holds(**changes: Any) -> bool:
        config = OlmoeConfig(**{**SIZES, **changes})
        return holds_model(tmp_path, config, parameters.__getitem__, torch.float32)

    assert holds()
    assert not holds(norm_topk_prob=True)
    assert not holds_model(tmp_path, model.config, parameters.__getitem__, torch.bfloat16)
    assert not holds_model(tmp_path / "nowhere", model.config, parameters.__getitem__, torch.float32)
    weight = parameters["model.layers.1.mlp.experts.down_proj"]
    weight[2, 0, 0] = torch.nextafter(weight[2, 0, 0], torch.tensor(9.0))
    assert not holds()


# --- refusals ---------------------------------------------------------------------------------------------


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = tensors_of(directory)
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


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
    assert "lm_head.weight is [41, 8], the model's is [40, 8]" in message


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
    with pytest.raises(UserError, match=r"which is no .safetensors file beside the index"):
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
    weight_map = {}
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
    with pytest.raises(UserError, match=r"pytorch_model.bin.* only, a pickle, .* set trust_pickle=true"):
        OlmoeForCausalLM.from_pretrained(saved)
    model = OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)
    assert_same(model, make())
    into = make()
    with torch.no_grad():
        into.lm_head.weight.zero_()
    load_pretrained(into, saved, trust_pickle=True)
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
    with pytest.raises(UserError, match=r"pytorch_model\.bin: asks for more than tensors"):
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
    with pytest.raises(UserError, match=r"pytorch_model\.bin: (cannot be read|asks for more)"):
        OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)
    file.unlink()
    with pytest.raises(UserError, match="no weights there"):
        OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)
    index = {"weight_map": dict.fromkeys(tensors, "../elsewhere.bin")}
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(tensors, saved.parent / "elsewhere.bin")
    with pytest.raises(UserError, match=r"which is no .bin file beside the index"):
        OlmoeForCausalLM.from_pretrained(saved, trust_pickle=True)


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    make(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(OlmoeForCausalLM.from_pretrained(tmp_path), make(tie_word_embeddings=True))
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"][0].add_(1))
    with pytest.raises(UserError, match=r"lm_head.weight is not the embedding"):
        OlmoeForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_function_are_refused(saved: Path) -> None:
    other = make(norm_topk_prob=True, rope_theta=500.0, eos_token_id=3, attention_dropout=0.1)
    with pytest.raises(UserError) as caught:
        load_pretrained(other, saved)
    message = str(caught.value)
    assert "norm_topk_prob is False there and True in the model" in message
    assert "rope_theta" in message
    assert "eos_token_id" not in message, "training may choose its own special tokens and dropout"
    assert "attention_dropout" not in message

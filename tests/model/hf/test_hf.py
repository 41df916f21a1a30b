"""HF directories: what is written, and what is read back."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM, OlmoeModel
from olmoe_train.model.hf.directory import holds_model, hub_parts, plan_shards, write_directory
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.tensor_files import byte_count
from tests.support.hf_directories import TINY, assert_same, edit_json, make, tensors_of


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
    block = model.decoder_layers[1].mlp.experts
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
    seen: dict[str, str] = {}
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
    model.save_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    assert {t.dtype for t in tensors_of(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert_same(OlmoeForCausalLM.from_pretrained(tmp_path / "bf16"), make().bfloat16())
    wide = OlmoeForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert_same(wide, make().bfloat16().float())
    assert wide.config.dtype is torch.float32
    model.lm_head.bfloat16()
    with pytest.raises(UserError, match="several dtypes"):
        model.save_pretrained(tmp_path / "mixed")


def test_dtype_is_the_tensors_where_the_config_has_none(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, dtype=torch.float16)
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
    experts = model.decoder_layers[0].mlp.experts
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

    write_directory(OlmoeForCausalLM, model.config, tmp_path, read, torch.float32, max_shard_size=700)
    assert calls == list(parameters)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        write_directory(OlmoeForCausalLM, make().config, tmp_path / "out", read, torch.float32)
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
        OlmoeForCausalLM,
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
        config = OlmoeConfig(**TINY | changes)
        return holds_model(OlmoeForCausalLM, tmp_path, config, parameters.__getitem__, torch.float32)

    assert holds()
    assert not holds(norm_topk_prob=True)
    assert not holds_model(OlmoeForCausalLM, tmp_path, model.config, parameters.__getitem__, torch.bfloat16)
    assert not holds_model(
        OlmoeForCausalLM, tmp_path / "nowhere", model.config, parameters.__getitem__, torch.float32
    )
    weight = parameters["model.layers.1.mlp.experts.down_proj"]
    weight[2, 0, 0] = torch.nextafter(weight[2, 0, 0], torch.tensor(9.0))
    assert not holds()

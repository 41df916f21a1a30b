"""Adapters in PEFT's files, both ways. PEFT itself is the oracle, through PeftModel.from_pretrained."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters import peft_read, peft_write
from olmoe_train.model.adapters.add import add_adapter
from olmoe_train.model.adapters.merge import merged
from olmoe_train.model.adapters.peft_read import read_peft
from olmoe_train.model.adapters.peft_write import CONFIG, WEIGHTS, write_peft
from olmoe_train.model.adapters.spec import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    LM_HEAD,
    TARGETS,
    AdapterSpec,
    is_adapter_parameter,
)
from olmoe_train.utils.errors import UserError
from tests.support.pair import TINY, make_pair

ATTENTION_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# (hidden, width) and (experts, rank). With width 16 gate_up_proj is square, as in OLMoE-1B-7B. Where experts
# and rank are equal, a wrong order of the two raises nothing.
SIZES = [
    {"hidden_size": 32, "intermediate_size": width, "num_experts": experts, "rank": rank}
    for width, (experts, rank) in product((24, 16), ((8, 4), (8, 8), (4, 8)))
]
IDS_BS = torch.randint(3, TINY["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))


def pair(sizes: dict[str, Any]) -> tuple[OlmoeForCausalLM, transformers.OlmoeForCausalLM, int]:
    """Our model and Transformers' with the same weights, and the rank."""
    sizes = dict(sizes)
    rank = sizes.pop("rank")
    return *make_pair(TINY | sizes), rank


def noise(shape: torch.Size, seed: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noisy_adapter(model: OlmoeForCausalLM, spec: AdapterSpec) -> dict[str, Tensor]:
    """Put an adapter of noise into a model; returns its tensors and those of trained routers."""
    add_adapter(model, spec)
    tensors = {}
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                offset = 1.5 if name.endswith("magnitude") else 0.0
                parameter.copy_(noise(parameter.shape, seed) + offset)
                tensors[name] = parameter.detach()
    return tensors


def merged_logits(
    theirs: transformers.OlmoeForCausalLM, spec: AdapterSpec, tensors: dict[str, Tensor]
) -> Tensor:
    """Logits of Transformers' model with the adapter added to its weights."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            weight = tensors.get(name, parameter.detach())
            parameter.copy_(merged(name, weight, set(tensors), tensors.__getitem__, spec))
        return theirs(IDS_BS).logits


def peft_logits(theirs: transformers.OlmoeForCausalLM, directory: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(theirs, directory).eval()(IDS_BS).logits


def error(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


SPECS: list[dict[str, Any]] = [
    {"targets": (EXPERTS,)},
    {"targets": (ATTENTION, EXPERTS), "rslora": True},
    {"targets": TARGETS, "trains_router": True},
    {"targets": (ATTENTION, LM_HEAD, EMBEDDINGS), "dora": True},
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("options", SPECS, ids=["experts", "rslora", "all", "dora"])
def test_the_adapter_its_merge_and_peft_give_the_same_logits(
    sizes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs, rank = pair(sizes)
    spec = AdapterSpec(rank=rank, alpha=rank + 5.0, **options)
    base = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    plain = theirs(IDS_BS).logits.detach()
    tensors = noisy_adapter(ours, spec)
    with torch.no_grad():
        of_adapter = ours(IDS_BS).logits
    of_merged = merged_logits(theirs, spec, tensors)
    theirs.load_state_dict(base, strict=False)
    write_peft(tmp_path / "peft", spec, tensors, tensors.__getitem__, "BASE")
    of_peft = peft_logits(theirs, tmp_path / "peft")
    assert error(of_adapter, plain) > 0.1
    scale = of_adapter.abs().max().item()
    assert error(of_adapter, of_merged) < 1e-5 * scale
    assert error(of_adapter, of_peft) < 1e-5 * scale

    again, found = read_peft(tmp_path / "peft", ours.config)
    assert again == spec
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def peft_adapter(
    theirs: transformers.OlmoeForCausalLM, directory: Path, **options: Any
) -> tuple[transformers.OlmoeForCausalLM, Tensor]:
    """Let PEFT make an adapter of noise and save it; returns the base again, and the adapter's logits."""
    base = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    model = get_peft_model(theirs, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                offset = 1.5 if "magnitude" in name else 0.0
                parameter.copy_(noise(parameter.shape, seed) + offset)
        logits = model(IDS_BS).logits
    model.save_pretrained(str(directory))
    fresh = transformers.OlmoeForCausalLM(theirs.config).eval()
    fresh.load_state_dict(base, strict=False)
    return fresh, logits


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [], "target_parameters": EXPERT_PARAMETERS},
        {"target_modules": ATTENTION_MODULES, "target_parameters": EXPERT_PARAMETERS, "use_rslora": True},
        {
            "target_modules": ["q_proj", "v_proj", "lm_head"],
            "target_parameters": EXPERT_PARAMETERS,
            "rank_pattern": {"q_proj": 3, "gate_up_proj": 5},
            "alpha_pattern": {"lm_head": 40, "down_proj": 2},
        },
        {"target_modules": [], "target_parameters": EXPERT_PARAMETERS[1:]},
        {"target_modules": [*ATTENTION_MODULES, "embed_tokens", "lm_head"], "use_dora": True},
    ],
    ids=["experts", "rslora", "patterns", "down-only", "dora"],
)
def test_what_peft_wrote_is_read(sizes: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs, rank = pair(sizes)
    base, expected = peft_adapter(theirs, tmp_path, r=rank, lora_alpha=rank + 5, **options)
    spec, tensors = read_peft(tmp_path, ours.config)
    scale = expected.abs().max().item()
    assert error(merged_logits(base, spec, tensors), expected) < 1e-5 * scale
    add_adapter(ours, spec)
    with torch.no_grad():
        for name, tensor in tensors.items():
            ours.get_parameter(name).copy_(tensor)
        assert error(ours(IDS_BS).logits, expected) < 1e-5 * scale


def expert_major(b: Tensor, experts: int) -> Tensor:
    return b.unflatten(1, (experts, -1)).permute(1, 0, 2)


def swap_halves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.cat(tensor.chunk(2, 1)[::-1], 1) if name.endswith("gate_up_lora_B") else tensor
        for name, tensor in tensors.items()
    }


def swap_nesting(directory: Path) -> None:
    """Exchange the wrappers of the two parameters; with square matrices the shapes stay right."""
    tensors = load_file(directory / WEIGHTS)
    swapped = {}
    for key, tensor in tensors.items():
        inner = ".experts.base_layer."
        other = key.replace(inner, ".experts.") if inner in key else key.replace(".experts.", inner)
        swapped[other] = tensor
    save_file(swapped, directory / WEIGHTS)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("wrong", ["expert-major", "halves", "nesting"])
def test_wrong_layouts_are_seen(
    sizes: dict[str, Any], wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of the test above, with each mistake that raises nothing for square matrices."""
    ours, theirs, rank = pair(sizes)
    options = {"target_modules": [], "target_parameters": EXPERT_PARAMETERS}
    base, expected = peft_adapter(theirs, tmp_path, r=rank, lora_alpha=rank + 5, **options)
    if wrong == "expert-major":
        monkeypatch.setattr(peft_read, "_unstack_b", expert_major)
    if wrong == "nesting":
        swap_nesting(tmp_path)
    try:
        spec, tensors = read_peft(tmp_path, ours.config)
    except UserError:
        assert wrong == "nesting"
        return
    if wrong == "halves":
        tensors = swap_halves(tensors)
    assert error(merged_logits(base, spec, tensors), expected) > 1e-2 * expected.abs().max().item()


# --- older files ------------------------------------------------------------------------------------------


def write_files(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    directory.mkdir()
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"} | config
    (directory / CONFIG).write_text(json.dumps(values))
    prefixed = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(prefixed, directory / WEIGHTS)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_per_expert_are_read(rslora: bool, tmp_path: Path) -> None:
    """Against dense weights by the definition of each pair. (PEFT 0.21 loads gate_up with rsLoRA sqrt(2) too
    strong, so PEFT is the oracle without rsLoRA only.)"""
    ours, theirs, rank = pair(SIZES[0])
    files: dict[str, Tensor] = {}
    scale = 9 / (rank**0.5 if rslora else rank)
    weights = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for layer, expert in product(range(2), range(8)):
        experts = f"model.layers.{layer}.mlp.experts"
        for index, kind in enumerate(("gate", "up", "down")):
            width_in, width_out = (24, 32) if kind == "down" else (32, 24)
            seed = 100 * layer + 10 * expert + index
            a = noise(torch.Size((rank, width_in)), seed)
            b = noise(torch.Size((width_out, rank)), seed + 1000)
            key = f"{experts}.{expert}.{kind}_proj.lora_"
            files |= {f"{key}A.weight": a, f"{key}B.weight": b}
            stacked = weights[f"{experts}.{'down' if kind == 'down' else 'gate_up'}_proj"]
            rows = {"gate": slice(0, 24), "up": slice(24, 48), "down": slice(None)}[kind]
            stacked[expert, rows] += scale * (b @ a)
    config = {
        "r": rank,
        "lora_alpha": 9,
        "use_rslora": rslora,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    write_files(tmp_path / "old", config, files)
    spec, tensors = read_peft(tmp_path / "old", ours.config)
    assert (spec.rank, spec.targets) == (2 * rank, (EXPERTS,))
    assert read_peft(tmp_path / "old", ours.config, headers_only=True)[0] == spec
    expected = transformers.OlmoeForCausalLM(theirs.config).eval()
    expected.load_state_dict(weights, strict=False)
    logits = expected(IDS_BS).logits.detach()
    base = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    assert error(merged_logits(theirs, spec, tensors), logits) < 1e-5 * logits.abs().max().item()
    if not rslora:
        theirs.load_state_dict(base, strict=False)
        config_path = tmp_path / "old" / CONFIG
        values = json.loads(config_path.read_text()) | {"peft_version": "0.18.0", "target_parameters": None}
        config_path.write_text(json.dumps(values))
        assert error(peft_logits(theirs, tmp_path / "old"), logits) < 1e-5 * logits.abs().max().item()


@pytest.mark.parametrize("width", [24, 16])
def test_the_transposed_layout_of_peft_0_18_is_read(width: int, tmp_path: Path) -> None:
    """There A is [E R, O] and B is [I, R E]. With width 16 the file of gate_up_proj alone does not tell."""
    ours, theirs, rank = pair({"hidden_size": 32, "intermediate_size": width, "num_experts": 4, "rank": 8})
    files: dict[str, Tensor] = {}
    weights = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for inner, name in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            _, width_out, width_in = weights[f"{experts}.{name}"].shape
            a = noise(torch.Size((4 * rank, width_out)), layer)
            b = noise(torch.Size((width_in, rank * 4)), layer + 10)
            files |= {f"{experts}{inner}.lora_A.weight": a, f"{experts}{inner}.lora_B.weight": b}
            for expert in range(4):
                delta = b[:, expert::4] @ a[expert * rank : (expert + 1) * rank]  # [I, O]
                weights[f"{experts}.{name}"][expert] += 9 / rank * delta.t()
    config: dict[str, Any] = {"r": rank, "lora_alpha": 9, "target_parameters": EXPERT_PARAMETERS}
    write_files(tmp_path / "old", config | {"peft_version": "0.18.1"}, files)
    spec, tensors = read_peft(tmp_path / "old", ours.config)
    expected = transformers.OlmoeForCausalLM(theirs.config).eval()
    expected.load_state_dict(weights, strict=False)
    logits = expected(IDS_BS).logits.detach()
    assert error(merged_logits(theirs, spec, tensors), logits) < 1e-5 * logits.abs().max().item()

    write_files(tmp_path / "before-0.18", config, files)  # no peft_version: the shapes tell
    again, found = read_peft(tmp_path / "before-0.18", ours.config)
    assert again == spec
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    of_gate_up = {
        key.replace(".base_layer", ""): tensor for key, tensor in files.items() if ".base_layer" in key
    }
    config["target_parameters"] = EXPERT_PARAMETERS[:1]
    write_files(tmp_path / "gate-up", config, of_gate_up)
    if width == 16:
        with pytest.raises(UserError, match="has no peft_version, and the adapted weight is square"):
            read_peft(tmp_path / "gate-up", ours.config)
    else:
        assert read_peft(tmp_path / "gate-up", ours.config)[0].rank == rank


# --- refusals ---------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def set_nan(tensors: dict[str, Tensor]) -> None:
    tensors[Q_PROJ][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c, t: c.update(peft_type="LOHA"), "peft_type=LOHA: only LORA can be read"),
        (lambda c, t: c.update(bias="all"), "bias=all cannot be represented"),
        (lambda c, t: c.update(trainable_token_indices=[3]), "trainable_token_indices="),
        (lambda c, t: c.pop("r"), "r and lora_alpha must be positive numbers"),
        (lambda c, t: c.update(lora_alpha=0), "r and lora_alpha must be positive numbers"),
        (lambda c, t: c.update(r=5), "has rank 8, and adapter_config.json says 5"),
        (lambda c, t: c.update(init_lora_weights="pissa_niter_4"), "changed the base model"),
        (lambda c, t: t.update({Q_PROJ: torch.zeros(8)}), r"q_proj.lora_A.weight \[8\] is no matrix"),
        (lambda c, t: set_nan(t), r"q_proj\.lora_A\.weight.*nan"),
        (lambda c, t: t.pop(Q_PROJ), "q_proj.weight: lora_A, lora_B and"),
        (lambda c, t: t.update({Q_PROJ: torch.zeros(8, 31)}), "q_proj.lora_A is .*31.* there, and"),
        (
            lambda c, t: t.update({Q_PROJ.replace("layers.0", "layers.7"): torch.zeros(8, 32)}),
            "layers.7.self_attn.q_proj.weight: lora_A, lora_B",
        ),
        (
            lambda c, t: t.update(
                {"base_model.model.model.layers.0.mlp.gate.lora_A.weight": torch.zeros(8, 32)}
            ),
            "LoRA on the router cannot be represented",
        ),
        (lambda c, t: t.update({"something.else": torch.zeros(1)}), "does not start with base_model.model."),
        (lambda c, t: t.update({"base_model.model.score.weight": torch.zeros(1)}), "no tensor of a LoRA"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(edit: Edit, message: str, tmp_path: Path) -> None:
    ours, _, rank = pair(SIZES[1])
    config = ours.config
    spec = AdapterSpec(rank=rank, alpha=9.0, targets=(ATTENTION, EXPERTS))
    tensors = noisy_adapter(ours, spec)
    write_peft(tmp_path / "peft", spec, tensors, tensors.__getitem__, "BASE")
    values = json.loads((tmp_path / "peft" / CONFIG).read_text())
    stored = load_file(tmp_path / "peft" / WEIGHTS)
    edit(values, stored)
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(values))
    save_file(stored, tmp_path / "peft" / WEIGHTS)
    with pytest.raises(UserError, match=message) as refused:
        read_peft(tmp_path / "peft", config)
    assert str(tmp_path / "peft") in str(refused.value)


def test_dora_on_experts_has_no_peft_file(tmp_path: Path) -> None:
    ours, _, rank = pair(SIZES[0])
    spec = AdapterSpec(rank=rank, alpha=9.0, targets=(EXPERTS,), dora=True)
    tensors = noisy_adapter(ours, spec)
    with pytest.raises(UserError, match="PEFT has no DoRA for experts"):
        write_peft(tmp_path / "peft", spec, tensors, tensors.__getitem__, "BASE")
    assert not (tmp_path / "peft").exists()


def test_directories_that_are_no_adapter(tmp_path: Path) -> None:
    config = OlmoeConfig(**TINY)
    with pytest.raises(UserError, match=r"no adapter_config\.json; give the directory of a PEFT adapter"):
        read_peft(tmp_path, config)
    (tmp_path / CONFIG).write_text(json.dumps(peft_write.peft_config(AdapterSpec(4, 8.0, (EXPERTS,)), "B")))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: not found$"):
        read_peft(tmp_path, config)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle and is not read"):
        read_peft(tmp_path, config)
    assert not is_adapter_parameter("model.layers.0.mlp.gate.weight")

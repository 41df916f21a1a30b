"""Reads an adapter in PEFT's format, in three layouts of the experts (peft_write.py has the first).

stacked       PEFT 0.19 and later: one pair of matrices per stacked parameter.
transposed    PEFT up to 0.18: the same, with the two widths of the parameter exchanged. The file cannot tell
              where both widths are equal, as for gate_up_proj of OLMoE-1B-7B; `peft_version` tells.
per expert    Transformers 4: one pair per expert and projection, with gate and up apart.

What this package cannot represent is refused by name. An adapter of some projections or some layers is read
with A = B = 0 for the others: their gradients are 0, so they stay untrained, as in PEFT.

Shapes: E experts, R rank, I and O the widths of a weight, D hidden, F expert width.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter
from olmoe_train.model.adapters.peft_write import CONFIG, PREFIX, TARGET_MODULES, WEIGHTS
from olmoe_train.model.adapters.spec import EXPERTS, TARGETS, AdapterSpec, adapter_names, is_adapter_parameter
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import read_json_object
from olmoe_train.utils.finite import first_not_finite
from olmoe_train.utils.tensor_files import first_few

# Options of PEFT that change what an adapter computes, with the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "layers_to_transform": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# Values of init_lora_weights with which PEFT takes the initial adapter out of the base weights.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MATRIX = re.compile(
    r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB])|lora_(magnitude)_vector(?:\.weight)?)"
)
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj")


@dataclass
class _Pair:
    """A, B and magnitude of one weight, as far as they were found. Of experts: [E, R, I] and [E, O, R]."""

    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    scale: float = 0.0


@dataclass
class _File:
    """An adapter's files, with their names shortened to those of the model."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    experts: int
    pairs: dict[str, _Pair] = field(default_factory=dict)
    """Name of the adapted weight -> its matrices."""
    routers: dict[str, Tensor] = field(default_factory=dict)

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")

    def scale(self, name: str, rank: int) -> float:
        """The scale of the weight or module `name`, whose lora_A has this rank.

        Raises:
            UserError: The configuration says another rank.
        """
        expected = self._value("r", "rank_pattern", name)
        if rank != expected:
            raise self.refuse(f"{name} has rank {rank}, and {CONFIG} says {expected:g}")
        alpha = self._value("lora_alpha", "alpha_pattern", name)
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _value(self, key: str, patterns_key: str, name: str) -> float:
        """A value for one weight or module, by PEFT's rule for patterns."""
        patterns = self.config.get(patterns_key) or {}
        found = next((text for text in patterns if re.match(rf"(.*\.)?({text})$", name)), None)
        return float(self.config[key] if found is None else patterns[found])


def read_peft(
    directory: Path, config: OlmoeConfig, headers_only: bool = False
) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Read an adapter.

    Args:
        directory: Holds adapter_config.json and adapter_model.safetensors.
        config: Architecture of the model that the adapter is for.
        headers_only: Read shapes and no values: the tensors are on the meta device.

    Returns:
        The adapter, with dropout as in the file; and its tensors by this package's names, fp32, with the
        weights of trained routers. Where weights have different ranks, A and B are padded with zeros to the
        largest one; the padding has gradient 0 and stays 0. A difference of scales is in B.

    Raises:
        UserError: A file is missing or damaged, the adapter is for another model, or it has something that
            this package cannot represent; the message names the file and what it is.
    """
    file = _open(directory, config, headers_only)
    transposed = _is_transposed(file, config)
    for key, tensor in file.tensors.items():
        if key.endswith("mlp.gate.weight"):
            file.routers[key] = tensor
        elif not key.endswith((".base_layer.weight", "original_module.weight")):  # PEFT's copy of the base
            _add(file, key, tensor, transposed)
    _join_gate_and_up(file)
    if not file.pairs:
        raise file.refuse("holds no LoRA matrices of an OLMoE's weights")
    for name, pair in file.pairs.items():
        if pair.a is None or pair.b is None or (pair.magnitude is None) == bool(file.config.get("use_dora")):
            raise file.refuse(f"{name}: lora_A, lora_B and, with use_dora, the magnitude must all be there")
    return _normalized(file, config)


def _open(directory: Path, config: OlmoeConfig, headers_only: bool) -> _File:
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: no {CONFIG}; give the directory of a PEFT adapter")
    values = read_json_object(directory / CONFIG)
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = directory / "adapter_model.bin"
        hint = f"; {pickled.name} is a pickle and is not read: save it as safetensors with PEFT"
        raise UserError(f"{path}: not found{hint if pickled.is_file() else ''}")
    file = _File(path, values, {}, config.num_experts)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{directory / CONFIG}: peft_type={values.get('peft_type')}: only LORA can be read")
    for key, unused in _UNUSED.items():
        if key in values and values[key] not in unused and values[key] not in ([], {}):
            raise UserError(f"{directory / CONFIG}: {key}={values[key]} cannot be represented here")
    numbers = (values.get("r"), values.get("lora_alpha"))
    if not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise UserError(f"{directory / CONFIG}: r and lora_alpha must be positive numbers")
    if str(values.get("init_lora_weights")).startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"{directory / CONFIG}: init_lora_weights={values['init_lora_weights']} changed the base model, "
            "so the adapter does not fit the base itself; convert it to plain LoRA with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        stored = _read_shapes(path) if headers_only else load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for key, tensor in stored.items():
        if not key.startswith(PREFIX):
            raise file.refuse(f"{key}: the name does not start with {PREFIX}")
        if not headers_only and (found := first_not_finite(tensor)):
            raise file.refuse(f"{key}{found}")
        file.tensors[key.removeprefix(PREFIX)] = tensor.float()
    return file


def _read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device."""
    with safe_open(path, framework="pt") as file:
        keys = file.keys()  # not a dict
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in keys}


def _is_transposed(file: _File, config: OlmoeConfig) -> bool:
    """Whether stacked experts are in the layout of PEFT up to 0.18."""
    stacked = [key for key in file.tensors if ".mlp.experts." in key and not _EXPERT.match(key)]
    if not stacked:
        return False
    version = str(file.config.get("peft_version", ""))
    if (numbers := re.match(r"(\d+)\.(\d+)", version)) is not None:
        return (int(numbers[1]), int(numbers[2])) < (0, 19)
    # PEFT before 0.18 wrote no version. The width of an A tells, unless its weight is square.
    hidden, width = config.hidden_size, config.intermediate_size
    for key in stacked:
        if key.endswith(".lora_A.weight"):
            is_down = _stacked_name(file, key.removesuffix(".lora_A.weight")).endswith("down_proj")
            now, before = (width, hidden) if is_down else (hidden, 2 * width)
            if now != before:
                return file.tensors[key].shape[1] == before
    raise file.refuse(
        f"the layout of the experts is not known: {CONFIG} has no peft_version, and the adapted weight is "
        'square; add "peft_version" with the version of PEFT that wrote the file'
    )


def _add(file: _File, key: str, tensor: Tensor, transposed: bool) -> None:
    """Sort one tensor of the file into `file.pairs`."""
    match = _MATRIX.fullmatch(key)
    if match is None:
        raise file.refuse(f"{key}: no tensor of a LoRA or DoRA adapter, or of a router")
    module, kind = match[1], match[2] or match[3] or match[4]
    if kind != "magnitude" and tensor.ndim != 2:
        raise file.refuse(f"{key} {list(tensor.shape)} is no matrix")
    name, experts = f"{module}.weight", 0
    if module.endswith((".mlp.experts", ".mlp.experts.base_layer")):
        name, experts = _stacked_name(file, module), file.experts
        if kind == "magnitude" or tensor.shape[0 if kind == "A" else 1] % experts:
            raise file.refuse(f"{key} {list(tensor.shape)} does not fit {experts} experts")
        tensor = tensor.unflatten(0, (experts, -1)) if kind == "A" else _unstack_b(tensor, experts)
        if transposed:
            # There the factors are those of W.T: delta.T = B A, so A and B exchange their roles.
            kind, tensor = ("B", tensor.mT) if kind == "A" else ("A", tensor.mT)
    elif ".mlp.gate" in module:
        raise file.refuse(
            f"{key}: LoRA on the router cannot be represented; adapter.router=full trains it whole"
        )
    pair = file.pairs.setdefault(name, _Pair())
    setattr(pair, {"A": "a", "B": "b"}.get(kind, kind), tensor.flatten() if kind == "magnitude" else tensor)
    if kind == "A":
        rank = tensor.shape[1 if experts else 0]
        pair.scale = file.scale(name if experts else module, rank)


def _unstack_b(b: Tensor, experts: int) -> Tensor:
    """[O, R E] -> [E, O, R]; the inverse of peft_write.stack_b."""
    return b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _stacked_name(file: _File, module: str) -> str:
    """The stacked parameter that a wrapper of `mlp.experts` is for."""
    named = [str(name).rpartition(".")[2] for name in file.config.get("target_parameters") or ()]
    both = f"{module.removesuffix('.base_layer')}.base_layer.lora_A.weight" in file.tensors
    experts = module.removesuffix(".base_layer")
    if both:
        return f"{experts}.{'gate_up_proj' if module.endswith('base_layer') else 'down_proj'}"
    # Only one of the two is adapted, and the name of the tensor does not say which.
    if len(kinds := {kind for kind in named if kind in ("gate_up_proj", "down_proj")}) != 1:
        raise file.refuse(f"{module}: target_parameters does not say which parameter of the experts this is")
    return f"{experts}.{kinds.pop()}"


def _join_gate_and_up(file: _File) -> None:
    """Stack the pairs of the layout per expert.

    With separate pairs for gate and up, A is [A_gate; A_up] and B is block-diagonal, of twice the rank. The
    scale stays that of each pair: PEFT scales by the doubled rank when it converts such a file with rsLoRA,
    which is sqrt(2) too much.
    """
    singles = {name: match for name in file.pairs if (match := _EXPERT.match(name))}
    grouped: dict[str, dict[int, dict[str, _Pair]]] = {}
    for name, match in singles.items():
        of_expert = grouped.setdefault(match[1], {}).setdefault(int(match[2]), {})
        of_expert[match[3]] = file.pairs.pop(name)
    for module, by_expert in grouped.items():
        if wrong := [expert for expert in by_expert if expert >= file.experts]:
            raise file.refuse(f"{module}.{wrong[0]}: the model has {file.experts} experts")
        for kinds, target in ((("gate", "up"), "gate_up_proj"), (("down",), "down_proj")):
            found = {e: {k: pairs[k] for k in kinds if k in pairs} for e, pairs in by_expert.items()}
            if any(found.values()):
                file.pairs[f"{module}.{target}"] = _stack_experts(file, module, found, kinds)


def _stack_experts(
    file: _File, module: str, found: dict[int, dict[str, _Pair]], kinds: tuple[str, ...]
) -> _Pair:
    example = next(pair for pairs in found.values() for pair in pairs.values())
    if example.a is None or example.b is None or example.magnitude is not None:
        raise file.refuse(f"{module}: experts with DoRA, or with only one of lora_A and lora_B")
    (rank, width_in), width_out = example.a.shape, example.b.shape[0]
    blocks = len(kinds)
    a = example.a.new_zeros(file.experts, blocks * rank, width_in)
    b = example.b.new_zeros(file.experts, blocks * width_out, blocks * rank)
    for expert, pairs in found.items():
        for kind, pair in pairs.items():
            if pair.a is None or pair.b is None or pair.a.shape != example.a.shape:
                raise file.refuse(f"{module}.{expert}.{kind}_proj: not the shapes of the other experts")
            block = kinds.index(kind)
            ranks = slice(block * rank, (block + 1) * rank)
            a[expert, ranks] = pair.a
            ratio = pair.scale / example.scale
            b[expert, block * width_out : (block + 1) * width_out, ranks] = pair.b * ratio
    return _Pair(a, b, None, example.scale)


def _normalized(file: _File, config: OlmoeConfig) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """One rank and one scale for all weights, and every tensor that the model has a place for."""
    rank = max(pair.a.shape[-2] for pair in file.pairs.values() if pair.a is not None)
    scale = max(pair.scale for pair in file.pairs.values())
    rslora = bool(file.config.get("use_rslora"))
    dora = bool(file.config.get("use_dora"))
    alpha, stored_alpha = scale * (rank**0.5 if rslora else rank), float(file.config["lora_alpha"])
    spec = AdapterSpec(
        rank=rank,
        # alpha / rank * rank is not alpha in floating point, for example for 8 and 49.
        alpha=stored_alpha if math.isclose(alpha, stored_alpha) else alpha,
        targets=tuple(target for target in TARGETS if any(_is_target(name, target) for name in file.pairs)),
        dropout=float(file.config.get("lora_dropout") or 0.0),
        rslora=rslora,
        dora=dora,
        trains_router=bool(file.routers),
    )
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    add_adapter(model, spec)
    expected = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    tensors = dict(file.routers)
    for name, pair in file.pairs.items():
        tensors |= _tensors_of(name, pair, spec)
    _check(file, tensors, expected)
    for name, shape in expected.items():
        if name not in tensors:
            if dora or not is_adapter_parameter(name):
                raise file.refuse(f"{name} is missing: DoRA and trained routers must be in every layer")
            tensors[name] = torch.zeros(shape)
    return spec, tensors


def _tensors_of(name: str, pair: _Pair, spec: AdapterSpec) -> dict[str, Tensor]:
    assert pair.a is not None
    assert pair.b is not None
    padding = spec.rank - pair.a.shape[-2]
    name_a, name_b, name_m = adapter_names(name)
    tensors = {
        name_a: torch.nn.functional.pad(pair.a, (0, 0, 0, padding)),
        name_b: torch.nn.functional.pad(pair.b * (pair.scale / spec.scale), (0, padding)),
    }
    if pair.magnitude is not None:
        tensors[name_m] = pair.magnitude
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _is_target(name: str, target: str) -> bool:
    if target == EXPERTS:
        return ".mlp.experts." in name
    return any(name.endswith(f"{module}.weight") for module in TARGET_MODULES[target])


def _check(file: _File, tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise file.refuse(f"tensors for weights that this model does not have: {first_few(unknown)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise file.refuse(
                f"{name} is {list(tensor.shape)} there, and {list(expected[name])} in this model"
            )

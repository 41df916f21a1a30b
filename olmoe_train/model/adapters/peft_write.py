"""Writes an adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

The layout is that of PEFT 0.19 and later (peft 0.21.2, tuners/lora/layer.py, ParamWrapper). PEFT stacks the
experts of a layer into one pair of matrices. lora_A [E R, I] has its rows expert by expert. lora_B [O, R E]
has its columns rank by rank, with the experts inside. PEFT wraps a module once for each adapted parameter of
it. Of two wrappers the inner one, `base_layer`, is for gate_up_proj.

Shapes: E experts, R rank, I and O the widths of a weight.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from olmoe_train.model.adapters.spec import ATTENTION, EMBEDDINGS, EXPERTS, LM_HEAD, AdapterSpec
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_directory, write_json

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Which layout the file has; PEFT writes its own version here. Up to 0.18 the stacked layout was transposed.
PEFT_VERSION = "0.21.2"
TARGET_MODULES = {
    ATTENTION: ("q_proj", "k_proj", "v_proj", "o_proj"),
    LM_HEAD: ("lm_head",),
    EMBEDDINGS: ("embed_tokens",),
}
TARGET_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate"


def stack_a(a_ERI: Tensor) -> Tensor:
    """[E, R, I] -> [E R, I], expert by expert."""
    return a_ERI.flatten(0, 1)


def stack_b(b_EOR: Tensor) -> Tensor:
    """[E, O, R] -> [O, R E]: rank by rank, the experts inside."""
    return b_EOR.permute(1, 2, 0).flatten(1)


def peft_key(name: str) -> str:
    """PEFT's name of a tensor of an adapter.

    Args:
        name: Such as `model.layers.0.mlp.experts.gate_up_lora_A`, or `model.layers.0.mlp.gate.weight` for a
            trained router.
    """
    module, _, kind = name.rpartition(".")
    matrix = kind[-6:]
    if kind == "weight":
        return f"{PREFIX}{name}"
    if kind == "magnitude":
        return f"{PREFIX}{module}.lora_magnitude_vector"
    if module.endswith("embed_tokens"):
        return f"{PREFIX}{module}.lora_embedding_{matrix[-1]}"
    inner = ".base_layer" if kind.startswith("gate_up") else ""
    return f"{PREFIX}{module}{inner}.{matrix}.weight"


def peft_tensor(name: str, tensor: Tensor) -> Tensor:
    """A tensor of an adapter as PEFT stores it, fp32."""
    tensor = tensor.to("cpu", torch.float32)
    if ".mlp.experts." in name:
        tensor = stack_a(tensor) if name.endswith("lora_A") else stack_b(tensor)
    return tensor.contiguous()


def peft_config(spec: AdapterSpec, base: str) -> dict[str, Any]:
    """Content of adapter_config.json.

    Args:
        spec: The adapter.
        base: Name or path of the model that the adapter is for.
    """
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0 if EXPERTS in spec.targets else spec.dropout,  # PEFT has none for parameters
        "modules_to_save": [ROUTER] if spec.trains_router else None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": spec.rank,
        "target_modules": [name for target in spec.targets for name in TARGET_MODULES.get(target, ())],
        "target_parameters": list(TARGET_PARAMETERS) if EXPERTS in spec.targets else None,
        "task_type": "CAUSAL_LM",
        "use_dora": spec.dora,
        "use_rslora": spec.rslora,
    }


_CARD = """---
library_name: peft
base_model: {base}
tags: [olmoe, moe, lora]
---
# An adapter of {base}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_DIRECTORY")
```

PEFT 0.19 or later reads the adapter as it is. Made by olmoe-train.
"""


def write_peft(
    directory: Path, spec: AdapterSpec, names: Iterable[str], read: Callable[[str], Tensor], base: str
) -> None:
    """Write an adapter. The directory never appears half written.

    Args:
        directory: The directory to write; it must not exist, or be empty.
        spec: The adapter.
        names: Names of its tensors, and of the weights of trained routers.
        read: Returns one whole tensor by its name.
        base: Name or path of the model that the adapter is for.

    Raises:
        UserError: PEFT cannot represent the adapter: DoRA on experts.
    """
    if spec.dora and EXPERTS in spec.targets:
        raise UserError(
            "format=peft: PEFT has no DoRA for experts (target_parameters with use_dora); export the merged "
            "model with format=hf"
        )
    tensors = {peft_key(name): peft_tensor(name, read(name)) for name in sorted(names)}
    with atomic_directory(directory) as partial:
        write_json(partial / CONFIG, peft_config(spec, base))
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / "README.md").write_text(_CARD.format(base=base), encoding="utf-8")

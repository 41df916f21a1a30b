"""Dense OLMo checkpoints in Transformers' format (`model_type` olmo: OLMo 1, arXiv 2402.00838), read as an
OLMoE with one expert. The two architectures are the same except for their norms.

Norms of the residual stream. OLMo has LayerNorms without parameters: (x - mean(x)) / sqrt(var(x) + 1e-5).
OLMoE has RMSNorms: x / sqrt(mean(x^2) + eps) * weight. A LayerNorm ignores the mean of its input x, and x is
the sum of the outputs of the embedding, o_proj and down_proj. `centered_writers` therefore subtracts the mean
over D from these weights. This does not change any LayerNorm's output. The residual stream then has mean 0,
and an RMSNorm with weight 1 and the same eps computes what the LayerNorm did. A tied head is not affected
either: its input is the output of the last norm, which has mean 0.

q_norm and k_norm. OLMo does not have them, and no weight makes them the identity, because they divide each
token's queries and keys by the root mean square of that token. `olmo_model` leaves them out. An OLMoE made
from an OLMo can only approximate the identity, with the typical root mean square as the weight.

Shapes: B batch, S sequence, V vocabulary, D hidden size, F MLP width, H attention width.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.checkpoint.convert.stored_model import StoredModel
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.hf.directory import (
    check_tied_head,
    dtype_to_use,
    ignored_tensors,
    parameter_shapes,
    refuse_quantized,
)
from olmoe_train.model.hf.special_tokens import read_generation_config
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import read_json_object
from olmoe_train.utils.tensor_files import StoredWeights, check_tensor_shapes

EPS = 1e-5
"""eps of OLMo's LayerNorms, a constant of its code: config.json has no field for it."""


def open_dense_olmo(directory: Path, trust_pickle: bool = False, strip_prefix: bool = False) -> StoredModel:
    """Open a dense OLMo as an OLMoE with one expert. Only file headers are read.

    Args:
        directory: Holds config.json and the weights.
        trust_pickle: Accept weights in a pickle, through torch.load(weights_only=True).
        strip_prefix: Take the prefixes of wrappers (`_orig_mod.`, `module.`) off the names of the tensors.

    Returns:
        The stored model. `read` returns the weights as stored; the parameters that OLMo does not have are 1
        for norms and 0 for the router.

    Raises:
        UserError: A file cannot be read, the weights are quantized, or a tensor is missing, unexpected or of
            the wrong shape; the message names every such tensor.
    """
    path = directory / "config.json"
    values = read_json_object(path)
    for name in ("model_type", "architectures"):
        values.pop(name, None)
    try:
        config = OlmoeConfig.from_dict(values, num_experts=1, num_experts_per_tok=1, rms_norm_eps=EPS)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    refuse_quantized(config, directory)
    stored = StoredWeights(directory, trust_pickle, strip_prefix)
    shapes = {name: tuple(shape) for name, shape in parameter_shapes(OlmoeForCausalLM, config).items()}
    expected = {part: shape for name in shapes for part, shape in _stored_parts(name, shapes[name]).items()}
    ignored = ignored_tensors(config, stored.tensors)
    tensors = {name: tensor for name, tensor in stored.tensors.items() if name not in ignored}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensor_shapes(f"{directory} does not fit its config.json:", expected, found)
    check_tied_head(config, stored, directory)
    dtypes = (tensor.dtype for tensor in tensors.values())
    dtype = config.dtype = dtype_to_use(config.dtype, dtypes, directory)

    def read(name: str) -> Tensor:
        parts = [stored.read_finite(part) for part in _stored_parts(name, shapes[name])]
        if not parts:
            return (torch.ones if name.endswith("norm.weight") else torch.zeros)(shapes[name], dtype=dtype)
        return torch.cat(parts)[None] if ".experts." in name else parts[0]

    return StoredModel(str(directory), config, read, directory, read_generation_config(directory))


def _stored_parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """OLMo's tensors, with their shapes, that make up one OLMoE parameter, concatenated along dimension 0."""
    if name.endswith(("norm.weight", "mlp.gate.weight")):
        return {}
    block, _, kind = name.rpartition(".experts.")
    if kind == "gate_up_proj":
        _, rows, columns = shape
        return {f"{block}.{half}_proj.weight": (rows // 2, columns) for half in ("gate", "up")}
    if kind == "down_proj":
        return {f"{block}.down_proj.weight": shape[1:]}
    return {name: shape}


def centered_writers(read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Subtract the mean over D from every weight that writes to the residual stream.

    Args:
        read: Returns one whole parameter by its in-memory name.

    Returns:
        The same kind of function. The weights it changes are fp32, the others are as `read` returns them.
    """
    writers = re.compile(r"self_attn\.o_proj\.(weight|bias)$|mlp\.experts\.down_proj$")

    def read_centered(name: str) -> Tensor:
        tensor = read(name)
        if name == "model.embed_tokens.weight":  # [V, D]
            return tensor.float() - tensor.float().mean(-1, keepdim=True)
        if writers.search(name):  # [D, H], [D] or [1, D, F]
            dimension = 1 if tensor.dim() == 3 else 0
            return tensor.float() - tensor.float().mean(dimension, keepdim=True)
        return tensor

    return read_centered


class OlmoLayerNorm(nn.Module):
    """LayerNorm over the last dimension, without parameters, computed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape and floating-point dtype; the result has the same shape and dtype."""
        return F.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)


def olmo_model(config: OlmoeConfig) -> OlmoeForCausalLM:
    """OLMo 1, built from this package's modules with OLMo's norms, on the meta device.

    Args:
        config: The configuration that `open_dense_olmo` returns.
    """
    with torch.device("meta"):
        model = without_qk_norm(OlmoeForCausalLM(config))
    for layer in model.model.layers:
        layer.register_module("input_layernorm", OlmoLayerNorm())
        layer.register_module("post_attention_layernorm", OlmoLayerNorm())
    model.model.register_module("norm", OlmoLayerNorm())
    return model


def without_qk_norm(model: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """Replace q_norm and k_norm of every layer by the identity, in place; returns the model."""
    for layer in model.decoder_layers:
        layer.self_attn.register_module("q_norm", nn.Identity())
        layer.self_attn.register_module("k_norm", nn.Identity())
    return model


def record_query_key_rms(model: OlmoeForCausalLM) -> dict[str, list[Tensor]]:
    """Record the size of queries and keys in every following forward pass.

    Args:
        model: A model whose q_norm and k_norm are the identity (`without_qk_norm`).

    Returns:
        Parameter name of each q_norm and k_norm -> a list to which every pass appends the root mean square
        over H of each token, [B, S].
    """
    recorded: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for which in ("q_norm", "k_norm"):
            of_norm = recorded[f"model.layers.{index}.self_attn.{which}.weight"] = []
            layer.get_submodule(f"self_attn.{which}").register_forward_hook(partial(_append_rms, of_norm))
    return recorded


def _append_rms(recorded: list[Tensor], module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    recorded.append(output.square().mean(-1).sqrt())

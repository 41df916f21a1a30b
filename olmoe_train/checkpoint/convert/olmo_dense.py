"""Dense OLMo checkpoints in Transformers' format (`model_type` olmo: OLMo 1, arXiv 2402.00838), read as an
OLMoE with one expert, which they are but for two things.

Norms. OLMo has LayerNorms without parameters, (x - mean(x)) / sqrt(var(x) + 1e-5), OLMoE has RMSNorms, x /
sqrt(mean(x^2) + eps) x weight. Every LayerNorm ignores the mean of the residual stream x, and x is a sum of
what embedding, o_proj and down_proj write to it. So take the mean out of all that they can write (`centred`):
no LayerNorm notices; the stream then is free of a mean, and RMSNorm with weight 1 and the same eps computes
the same. Nor does a tied head notice: it multiplies what the last norm gives, which has no mean either.

q_norm and k_norm. OLMo has none, and no weight makes one the identity: it divides each token's queries by
their own size. `olmo_model` leaves them out; an OLMoE made of it can at best have the usual size as weight.

Shapes: D hidden, F MLP width, H attention width.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.checkpoint.convert.source import Source
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.hf.directory import parameter_shapes, refuse_untied
from olmoe_train.model.hf.special_tokens import read_generation_config
from olmoe_train.model.transformer import OlmoeDecoderLayer
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import read_json_object
from olmoe_train.utils.tensor_files import StoredWeights, check_tensor_shapes

EPS = 1e-5
"""Of OLMo's LayerNorms; no field of its config.json."""


def open_dense_olmo(directory: Path, trust_pickle: bool = False) -> Source:
    """`read` gives the parameters of the OLMoE with one expert, as stored: norm weights, which OLMo has not,
    are 1, the router's is 0. UserError names every tensor that is missing, unexpected or mis-shaped.
    """
    path = directory / "config.json"
    values = read_json_object(path)
    for name in ("model_type", "architectures"):
        values.pop(name, None)
    try:
        config = OlmoeConfig.from_dict(values, num_experts=1, num_experts_per_tok=1, rms_norm_eps=EPS)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    stored = StoredWeights(directory, trust_pickle)
    shapes = {name: tuple(shape) for name, shape in parameter_shapes(OlmoeForCausalLM, config).items()}
    expected = {part: shape for name in shapes for part, shape in _parts(name, shapes[name]).items()}
    # A tied head may be in the file beside the embedding; older converters wrote a constant of RoPE.
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = {
        name: tensor.shape
        for name, tensor in stored.tensors.items()
        if name not in ignored and not name.endswith("rotary_emb.inv_freq")
    }
    check_tensor_shapes(f"{directory} does not fit its config.json:", expected, found)
    refuse_untied(config, stored, directory)
    dtype = config.dtype = config.dtype or next(iter(stored.tensors.values())).dtype

    def read(name: str) -> Tensor:
        parts = [stored.read(part) for part in _parts(name, shapes[name])]
        if not parts:
            return (torch.ones if name.endswith("norm.weight") else torch.zeros)(shapes[name], dtype=dtype)
        return torch.cat(parts)[None] if ".experts." in name else parts[0]

    return Source(str(directory), config, read, directory, read_generation_config(directory))


def _parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """OLMo's tensors that our parameter is made of, on top of each other, and their shapes."""
    if name.endswith(("norm.weight", "mlp.gate.weight")):
        return {}
    block, _, kind = name.rpartition(".experts.")
    if kind == "gate_up_proj":
        _, rows, columns = shape
        return {f"{block}.{half}_proj.weight": (rows // 2, columns) for half in ("gate", "up")}
    if kind == "down_proj":
        return {f"{block}.down_proj.weight": shape[1:]}
    return {name: shape}


def centred(read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """The same weights, with no mean over D in anything that they write to the residual stream; what is
    changed is fp32."""
    writers = re.compile(r"self_attn\.o_proj\.(weight|bias)$|mlp\.experts\.down_proj$")

    def read_centred(name: str) -> Tensor:
        tensor = read(name)
        if name == "model.embed_tokens.weight":  # [V, D]
            return tensor.float() - tensor.float().mean(-1, keepdim=True)
        if writers.search(name):  # [D, H], [D], [1, D, F]
            dimension = 1 if tensor.dim() == 3 else 0
            return tensor.float() - tensor.float().mean(dimension, keepdim=True)
        return tensor

    return read_centred


class OlmoLayerNorm(nn.Module):
    """LayerNorm without parameters, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)


def olmo_model(config: OlmoeConfig) -> OlmoeForCausalLM:
    """OLMo 1 itself, on the meta device: our modules with its norms. config: open_dense_olmo's."""
    with torch.device("meta"):
        model = without_qk_norm(OlmoeForCausalLM(config))
    for layer in model.model.layers:
        layer.register_module("input_layernorm", OlmoLayerNorm())
        layer.register_module("post_attention_layernorm", OlmoLayerNorm())
    model.model.register_module("norm", OlmoLayerNorm())
    return model


def without_qk_norm(model: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """Take q_norm and k_norm out of a model, in place."""
    for layer in model.model.layers:
        assert isinstance(layer, OlmoeDecoderLayer)
        layer.self_attn.register_module("q_norm", nn.Identity())
        layer.self_attn.register_module("k_norm", nn.Identity())
    return model


def watch_sizes(model: OlmoeForCausalLM) -> dict[str, list[Tensor]]:
    """Filled by the model's next forward passes: by q_norm's and k_norm's names, the root mean square over H
    of every token's queries and keys, [B, S] a pass."""
    sizes: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for which in ("q_norm", "k_norm"):
            of_this = sizes[f"model.layers.{index}.self_attn.{which}.weight"] = []
            layer.get_submodule(f"self_attn.{which}").register_forward_hook(partial(_note_size, of_this))
    return sizes


def _note_size(sizes: list[Tensor], module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    sizes.append(output.square().mean(-1).sqrt())

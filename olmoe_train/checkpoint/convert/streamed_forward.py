"""The logits of a stored model of any size, with one of its layers in memory at a time.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.rope import rotary_cos_sin
from olmoe_train.model.transformer import OlmoeForCausalLM


@torch.no_grad()
def streamed_logits(model: OlmoeForCausalLM, read: Callable[[str], Tensor], input_ids_BS: Tensor) -> Tensor:
    """[B, S, V], computed in fp32 on the CPU.

    model: on the meta device, and left there; what has been changed in its layers counts. read: gives each
    of its parameters by name, whole and in any dtype.
    """
    model.eval()
    decoder = model.model
    x_BSD = read("model.embed_tokens.weight")[input_ids_BS].float()
    positions_1S = torch.arange(input_ids_BS.shape[1])[None]
    rotary = rotary_cos_sin(model.config, positions_1S, torch.float32)
    for index, layer in enumerate(decoder.layers):
        _fill(layer, f"model.layers.{index}", read)
        x_BSD = layer(x_BSD, rotary)[0]
        layer.to("meta")
    _fill(decoder.norm, "model.norm", read)
    x_BSD = decoder.norm(x_BSD)
    decoder.norm.to("meta")
    tied = model.config.tie_word_embeddings
    return F.linear(x_BSD, read("model.embed_tokens.weight" if tied else "lm_head.weight").float())


def _fill(module: nn.Module, name: str, read: Callable[[str], Tensor]) -> None:
    module.to(torch.float32).to_empty(device="cpu")
    for part, parameter in module.named_parameters():
        parameter.copy_(read(f"{name}.{part}"))

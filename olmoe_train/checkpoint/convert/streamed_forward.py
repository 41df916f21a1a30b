"""The logits of a stored model of any size, computed with one decoder layer in memory at a time.

Shapes: B batch, S sequence, D hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.rope import rotary_cos_sin
from olmoe_train.model.transformer import OlmoeForCausalLM


@torch.no_grad()
def streamed_logits(model: OlmoeForCausalLM, read: Callable[[str], Tensor], input_ids_BS: Tensor) -> Tensor:
    """Compute logits on the CPU in fp32.

    Args:
        model: A model on the meta device, on which it is left. Modules replaced in its layers are used.
        read: Returns one whole parameter by its in-memory name, in any dtype.
        input_ids_BS: Token ids, int64 [B, S].

    Returns:
        Logits, fp32 [B, S, V].
    """
    model.eval()
    decoder = model.model
    x_BSD = read("model.embed_tokens.weight")[input_ids_BS].float()
    positions_1S = torch.arange(input_ids_BS.shape[1])[None]
    rotary = rotary_cos_sin(model.config, positions_1S, torch.float32)
    for index, layer in enumerate(decoder.layers):
        _load(layer, f"model.layers.{index}", read)
        x_BSD = layer(x_BSD, rotary)[0]
        layer.to("meta")
    _load(decoder.norm, "model.norm", read)
    x_BSD = decoder.norm(x_BSD)
    decoder.norm.to("meta")
    tied = model.config.tie_word_embeddings
    return F.linear(x_BSD, read("model.embed_tokens.weight" if tied else "lm_head.weight").float())


def _load(module: nn.Module, name: str, read: Callable[[str], Tensor]) -> None:
    """Allocate a meta module on the CPU in fp32 and read its parameters; `name` is its name in the model."""
    module.to(torch.float32).to_empty(device="cpu")
    for part, parameter in module.named_parameters():
        parameter.copy_(read(f"{name}.{part}"))

"""The frozen base of an adapter: loads it, identifies it, and adds the adapter of a checkpoint to it.

A checkpoint of an adapter holds what was trained, and not the base. It records where the base was and a hash
of the base's weights, so that another base is refused.
"""

from pathlib import Path

import torch
import xxhash
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import StoredModel
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.add import (
    adapted_weight,
    magnitude_of,
    quantized_weights,
)
from olmoe_train.model.adapters.nf4 import round_trip_nf4
from olmoe_train.model.adapters.spec import BaseIdentity
from olmoe_train.model.hf.directory import assign, check_same_architecture, parameter_shapes


class WeightHash:
    """Hashes weights that are given in a fixed order."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def add(self, name: str, weight: Tensor) -> None:
        """weight: whole, on the CPU, in its stored dtype."""
        self._digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        self._digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Of what was added so far."""
        return self._digest.hexdigest()


@torch.no_grad()
def load_base(model: OlmoeForCausalLM, stored: StoredModel, source: str | Path) -> BaseIdentity:
    """Fill the frozen weights of a model with an adapter, quantize those that are to be, and set the
    magnitudes.

    Every rank reads for itself, and holds one whole parameter in memory at a time.

    Args:
        model: Its parameters may be whole or sharded (DTensor).
        stored: The base.
        source: What names the base.

    Raises:
        UserError: A weight is not finite, or the architectures differ.
    """
    check_same_architecture(model.config, stored.config, stored.name)
    parameters = dict(model.named_parameters())
    quantized = quantized_weights(model)
    magnitudes = {adapted_weight(name): name for name in parameters if name.endswith("magnitude")}
    digest = WeightHash()
    for name in parameter_shapes(OlmoeForCausalLM, model.config):
        weight = stored.read(name)
        digest.add(name, weight)
        if name in quantized:
            quantized[name].set_weight(weight)
        else:
            weight = weight.to(parameters[name].dtype)
            assign(parameters[name], weight)
        if (magnitude := magnitudes.get(name)) is not None:
            if name in quantized:
                weight = round_trip_nf4(weight)
            assign(parameters[magnitude], magnitude_of(magnitude, weight))
    return BaseIdentity(str(Path(source).expanduser().absolute()), digest.hexdigest())

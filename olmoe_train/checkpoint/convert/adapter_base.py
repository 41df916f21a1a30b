"""The frozen base of an adapter: loads it, identifies it, and adds the adapter of a checkpoint to it.

A checkpoint of an adapter holds what was trained, and not the base. It records where the base was and a hash
of the base's weights, so that another base is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from olmoe_train.checkpoint.sharded import model_tensor_names, open_model_tensors, saved_state
from olmoe_train.config.adapter import adapter_spec, quantizes_base, saved_adapter
from olmoe_train.config.choices import Weights
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import is_quantizable, magnitude_of, quantized_weights
from olmoe_train.model.adapters.merge import merged
from olmoe_train.model.adapters.nf4 import round_trip_nf4
from olmoe_train.model.adapters.spec import AdapterSpec, BaseIdentity, adapter_names
from olmoe_train.model.hf.directory import assign, parameter_shapes
from olmoe_train.utils.errors import UserError

Read = Callable[[str], Tensor]


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
def load_base(model: OlmoeForCausalLM, read: Read, source: str | Path) -> BaseIdentity:
    """Fill the frozen weights of a model with an adapter, quantize those that are to be, and set the
    magnitudes.

    Every rank reads for itself, and holds one whole parameter in memory at a time.

    Args:
        model: Its parameters may be whole or sharded (DTensor). It has the architecture of the base.
        read: Returns one whole weight of the base.
        source: What names the base.
    """
    parameters = dict(model.named_parameters())
    quantized = quantized_weights(model)
    digest = WeightHash()
    for name in parameter_shapes(OlmoeForCausalLM, model.config):
        weight = read(name)
        digest.add(name, weight)
        if name in quantized:
            quantized[name].set_weight(weight)
        else:
            weight = weight.to(parameters[name].dtype)
            assign(parameters[name], weight)
        if (magnitude := adapter_names(name)[2]) in parameters:
            weight = round_trip_nf4(weight) if name in quantized else weight
            assign(parameters[magnitude], magnitude_of(magnitude, weight))
    return BaseIdentity(str(Path(source).expanduser().absolute()), digest.hexdigest())


def check_base(config: OlmoeConfig, read: Read, expected: BaseIdentity, where: str) -> None:
    """Check that a base is the one that an adapter was trained on. Reads all its weights.

    Args:
        config: Architecture of the base.
        read: Returns one whole weight of the base.
        expected: As the adapter's checkpoint records it.
        where: What to call the base in the message.

    Raises:
        UserError: It is another one.
    """
    digest = WeightHash()
    for name in parameter_shapes(OlmoeForCausalLM, config):
        digest.add(name, read(name))
    if digest.hexdigest() != expected.xxh3_128:
        raise UserError(
            f"{where} has other weights than the base that the adapter was trained on (hash "
            f"{digest.hexdigest()}, in the checkpoint {expected.xxh3_128}): bring that model back to "
            f"{expected.path}, or set model.init_from in the run's config.yaml to where it is"
        )


@dataclass(frozen=True)
class SavedAdapter:
    """The adapter of a training checkpoint, whose tensors are read one at a time."""

    spec: AdapterSpec
    quantized: bool
    """Whether the base was in NF4."""
    base: BaseIdentity
    base_name: str
    """Name of the base on the hub, or its absolute path."""
    names: frozenset[str]
    """Names of all trained tensors, those of a trained router included."""
    read: Read
    """Returns one whole tensor, fp32."""

    def reader_of_merged(self, read_base: Read) -> Read:
        """A function that returns a weight of the base with the adapter added in fp32, by its name.

        An NF4 base is quantized and dequantized first: the result is what the adapter was trained with.
        """

        def read(name: str) -> Tensor:
            if name in self.names:
                return self.read(name)  # a trained router
            weight = read_base(name)
            if self.quantized and adapter_names(name)[0] in self.names and is_quantizable(name):
                weight = round_trip_nf4(weight)
            return merged(name, weight, self.names, self.read, self.spec)

        return read


def open_adapter(checkpoint: Path, which: Weights = Weights.weights) -> SavedAdapter | None:
    """The adapter of a training checkpoint, or the average of its weights; None if the checkpoint holds a
    whole model.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    state: dict[str, Any] = saved_state(checkpoint)
    section = state.get("config", {}).get("adapter") or {}
    cfg = saved_adapter(section)
    spec = adapter_spec(cfg)
    if spec is None:
        return None
    base, model = BaseIdentity(**state["base"]), state["config"]["model"]
    return SavedAdapter(
        spec,
        quantizes_base(cfg),
        base,
        model["init_from"] if model.get("revision") is not None else base.path,
        frozenset(model_tensor_names(checkpoint, which)),
        open_model_tensors(checkpoint, which),
    )

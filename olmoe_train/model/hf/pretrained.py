"""The base class of OlmoeModel and OlmoeForCausalLM, which reads and writes Hugging Face directories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.hf.directory import assign, open_pretrained, write_directory
from olmoe_train.model.hf.special_tokens import read_generation_config
from olmoe_train.utils.errors import UserError


class OlmoePreTrainedModel(nn.Module):
    """Base class of OlmoeModel and OlmoeForCausalLM: loading and saving in the Hugging Face format."""

    config: OlmoeConfig
    generation_config: dict[str, Any] | None = None
    """Content of generation_config.json, from which generate() takes the end-of-text and padding tokens.
    None: there was no such file."""

    def __init__(self, config: OlmoeConfig) -> None:
        """config: the architecture."""
        super().__init__()
        self.config = config

    def tie_weights(self) -> None:
        """Share the parameters that the configuration ties. A model without a head has none to share."""

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        trust_pickle: bool = False,
        strip_prefix: bool = False,
    ) -> Self:
        """Load a Hugging Face directory.

        Args:
            directory: Holds config.json and the weights, with one tensor per expert (the hub's names) or
                with the experts of a layer stacked (the in-memory names).
            dtype: Data type of the parameters. None: as stored.
            device: Where the parameters go.
            trust_pickle: Accept weights in pytorch_model.bin, through torch.load(weights_only=True).
            strip_prefix: Take the prefixes of wrappers (`_orig_mod.`, `module.`) off the names of the
                tensors.

        Returns:
            The model in eval mode.

        Raises:
            UserError: A file is missing, damaged, or does not fit the configuration; the weights are
                quantized or not finite.
        """
        config, read = open_pretrained(cls, directory, trust_pickle, strip_prefix)
        config.dtype = dtype or config.dtype
        model = load_model(cls, config, read, device)
        model.generation_config = read_generation_config(Path(directory))
        return model

    def save_pretrained(
        self,
        directory: str | Path,
        max_shard_size: str | int = "5GB",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a whole (not sharded) model as a Hugging Face directory, with the hub's tensor names.

        Args:
            directory: The directory to write. It must not hold weights yet.
            max_shard_size: Largest safetensors file, in bytes or as text such as "5GB".
            dtype: Data type of the weights in the files. None: that of the parameters.

        Raises:
            UserError: `directory` already holds weights, the parameters have several dtypes and `dtype` is
                None, or the model's balancer has a state, for which the format has no place.
        """
        if state := [name for name, _ in self.named_buffers() if name.startswith("balancer.")]:
            raise UserError(
                f"the format has no place for {', '.join(state)}: save a checkpoint, and export it with "
                "fold=drop"
            )
        parameters = dict(self.named_parameters())
        assert not any(isinstance(p, DTensor) for p in parameters.values()), (
            "save_pretrained needs whole parameters: save a sharded model as a checkpoint, and export that"
        )
        dtypes = {parameter.dtype for parameter in parameters.values()}
        if dtype is None and len(dtypes) > 1:
            raise UserError(
                f"the parameters have several dtypes ({', '.join(map(str, dtypes))}): give dtype=..."
            )
        write_directory(
            type(self),
            self.config,
            directory,
            lambda name: parameters[name].detach(),
            dtype or dtypes.pop(),
            max_shard_size,
            generation=self.generation_config,
        )


AnyModel = TypeVar("AnyModel", bound=OlmoePreTrainedModel)


def load_model(
    model_class: type[AnyModel],
    config: OlmoeConfig,
    read: Callable[[str], Tensor],
    device: torch.device | str = "cpu",
) -> AnyModel:
    """Build a model and fill its parameters.

    Args:
        model_class: OlmoeForCausalLM or OlmoeModel.
        config: Architecture of the model; `config.dtype` is the dtype of its parameters.
        read: Returns one whole parameter by its in-memory name, in any dtype.
        device: Where the parameters go.

    Returns:
        The model in eval mode.
    """
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(config.dtype).to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assign(parameter, read(name).to(parameter.dtype))
    return model.eval()

"""The base class of both models: reading and writing Hugging Face directories (directory.py)."""

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
    """What OlmoeModel and OlmoeForCausalLM share: Hugging Face directories."""

    config: OlmoeConfig
    generation_config: dict[str, Any] | None = None
    """generation_config.json of the model's directory; generate() reads eos and pad from it."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config

    def tie_weights(self) -> None:
        """Share parameters where the configuration says so; a model without a head shares none."""

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        trust_pickle: bool = False,
    ) -> Self:
        """Load a Hugging Face directory (hub or fused tensor names) in eval mode.

        Args:
            directory: holds config.json and the weights.
            dtype: data type of the parameters; None: as stored.
            device: where the parameters go.
            trust_pickle: read a legacy pytorch_model.bin through torch.load(weights_only=True).

        Returns:
            The model in eval mode.

        Raises:
            UserError: a file is missing, damaged, or does not fit the configuration.
        """
        config, read = open_pretrained(cls, directory, trust_pickle)
        config.dtype = dtype or config.dtype
        model = model_of(cls, config, read, device)
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
            directory: must not hold weights yet.
            max_shard_size: largest safetensors file, in bytes or as text ("5GB").
            dtype: data type of the weights; None: that of the parameters.

        Raises:
            UserError: `directory` already holds weights, or the parameters have several dtypes and `dtype`
                is None.
        """
        parameters = dict(self.named_parameters())
        assert not any(isinstance(p, DTensor) for p in parameters.values()), (
            "sharded: save a checkpoint, export that"
        )
        dtypes = {parameter.dtype for parameter in parameters.values()}
        if dtype is None and len(dtypes) > 1:
            raise UserError(
                f"the parameters have several dtypes ({', '.join(map(str, dtypes))}): say dtype=..."
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


def model_of(
    model_class: type[AnyModel],
    config: OlmoeConfig,
    read: Callable[[str], Tensor],
    device: torch.device | str = "cpu",
) -> AnyModel:
    """The model in eval mode on a device, in config.dtype; `read` gives each whole parameter by name."""
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(config.dtype).to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assign(parameter, read(name).to(parameter.dtype))
    return model.eval()

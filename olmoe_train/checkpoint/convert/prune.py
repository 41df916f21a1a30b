"""A model with fewer experts: the rows of the routers and the weights of the experts that are kept.

With norm_topk_prob=true a routing weight is relative to those of the chosen experts, so an expert that no
token chooses can leave without a trace. With norm_topk_prob=false, as in OLMoE-1B-7B, the weights are the
softmax over all experts. Without experts that have probability m together, all others grow by 1 / (1 - m).
m is another one for each token, and no weight of the format can undo a factor of the token; see
docs/guides/prune-and-select.md.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import StoredModel
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.roles import ParameterRole, role_of


def pruned_model(stored: StoredModel, kept_LN: Sequence[Sequence[int]]) -> StoredModel:
    """A stored model with some of the experts of each layer.

    Args:
        stored: The model. Its weights are read one parameter at a time, when the result is read.
        kept_LN: For each layer the experts to keep, equally many in each. They keep this order.

    Returns:
        The model with num_experts=N. It belongs to no checkpoint of a run.
    """
    config = OlmoeConfig.from_dict(stored.config.to_dict(), num_experts=len(kept_LN[0]))
    return replace(
        stored, config=config, read=pruned_reader(stored.read, kept_LN), checkpoint=None, adapter=None
    )


def pruned_reader(read: Callable[[str], Tensor], kept_LN: Sequence[Sequence[int]]) -> Callable[[str], Tensor]:
    """Read only the experts that are kept.

    Args:
        read: Returns one whole parameter of the model by its in-memory name.
        kept_LN: For each layer the experts to keep.

    Returns:
        The same function of the model with fewer experts.
    """

    def read_kept(name: str) -> Tensor:
        weight = read(name)
        if role_of(name) not in (ParameterRole.router, ParameterRole.expert_matrix):
            return weight
        layer = re.search(r"layers\.(\d+)\.", name)
        assert layer is not None
        return weight.index_select(0, torch.tensor(kept_LN[int(layer[1])]))

    return read_kept

"""Download of the initial weights, if model.init_from is a model's name on the Hugging Face hub."""

import os

from olmoe_train.config.model import ModelConfig
from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.model.hf.hub import PICKLE_FILES, SMALL_FILES, WEIGHT_FILES, hub_snapshot, is_hub_name
from olmoe_train.utils.errors import UserError


def download_initial_weights(model: ModelConfig) -> None:
    """Bring the weights into the cache of each node, where all of its ranks then read them; collective.

    The first rank of a node downloads while the others wait. What the cache has is not downloaded again, so
    a run that could not wait any longer continues where its download ended.

    Raises:
        UserError: The hub does not provide the model, or ranks have found different commits of it.
    """
    if model.init_from is None or not is_hub_name(model.init_from):
        return
    name = model.init_from
    files = SMALL_FILES + WEIGHT_FILES + (PICKLE_FILES if model.trust_pickle else ())

    def download() -> str | None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            hub_snapshot(name, model.revision, files)
        return model.revision

    if len(found := set(gather_from_all(download))) > 1:
        raise UserError(
            f"model.init_from={name}: ranks found different commits of it, {', '.join(map(str, found))}; set "
            "model.revision to one of them"
        )

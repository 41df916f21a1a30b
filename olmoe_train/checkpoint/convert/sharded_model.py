"""A stored model on the ranks of a process group, to be evaluated: no rank holds more than its shard."""

import torch
import torch.distributed as dist

from olmoe_train.checkpoint.convert.stored_model import StoredModel, load_whole, use_bias
from olmoe_train.config.choices import Precision
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.distributed.materialize import reset_buffers
from olmoe_train.distributed.mesh import build_mesh
from olmoe_train.distributed.parallelize import parallelize
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.hf.directory import assign


def load_on_ranks(stored: StoredModel, parallel: ParallelConfig, device: torch.device) -> OlmoeForCausalLM:
    """Load a stored model in a layout; collective. One rank alone gets the whole model.

    Every rank reads one whole parameter at a time and keeps its shard of it.

    Args:
        stored: The model. `stored.config.dtype` is the dtype of weights and computation.
        parallel: The layout, checked; not deepspeed.
        device: Device of this rank.

    Returns:
        The model in eval mode.

    Raises:
        UserError: A weight is not finite.
    """
    if dist.get_world_size() == 1:
        return load_whole(stored, device)
    with torch.device("meta"):
        model = OlmoeForCausalLM(stored.config).to(stored.config.dtype)
    # The weights have the dtype of the computation already, so FSDP2 casts nothing: fp32 means that here.
    trainer = TrainerConfig(precision=Precision.fp32)
    model = parallelize(model, trainer, parallel, build_mesh(parallel, device))
    model.to_empty(device=device)
    reset_buffers(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assign(parameter, stored.read(name).to(parameter.dtype))
    use_bias(model, stored, device)
    model.generation_config = stored.generation
    return model.eval()

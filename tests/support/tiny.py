"""A tiny OLMoE on all ranks of the process group, and a training step that needs only the model."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from olmoe_train.config.choices import ActivationCheckpointing, Precision
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.distributed.materialize import materialize
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.distributed.parallelize import parallelize
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.sizes import SIZES

LENGTH, SEQUENCES = 16, 8


def build(
    parallel: ParallelConfig | None = None,
    checkpointing: str = "none",
    precision: str = "fp32",
    compiled: bool = False,
    seed: int = 3,
    **sizes: Any,
) -> tuple[OlmoeForCausalLM, torch.optim.AdamW]:
    """Return the parallelized, initialized model and its optimizer. sizes: fields of OlmoeConfig."""
    trainer = TrainerConfig(
        precision=Precision(precision),
        activation_checkpointing=ActivationCheckpointing(checkpointing),
        compile=compiled,
    )
    cfg = TrainConfig(trainer=trainer, parallel=parallel or ParallelConfig())
    mesh = build_mesh(cfg.parallel, init_distributed("cpu"))
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(**SIZES | sizes))
    model = parallelize(model, cfg.trainer, cfg.parallel, mesh)
    materialize(model, mesh.device, seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def global_batch(step: int) -> Tensor:
    """Return input_ids, int64 [SEQUENCES, LENGTH]. They are the same for every layout."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(2, SIZES["vocab_size"], (SEQUENCES, LENGTH), generator=generator)


def backward(model: OlmoeForCausalLM, ids_BS: Tensor, document_offsets: Tensor | None = None) -> float:
    """Compute gradients of the mean cross-entropy plus a router loss, both over the global batch.

    ids_BS: this rank's share of the global batch, int64 [B, S]. Returns the loss, summed over ranks.
    """
    output = model.training_forward(ids_BS, ids_BS, document_offsets=document_offsets)
    z = output.router.squared_logsumexp_L.sum()
    loss = output.ce_sum / (SEQUENCES * (LENGTH - 1)) + 0.01 * z / (SEQUENCES * LENGTH)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


def train_step(model: OlmoeForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Make one optimizer step on this rank's share of the global batch, and return the loss."""
    loss = backward(model, global_batch(step).chunk(dist.get_world_size())[dist.get_rank()])
    optimizer.step()
    optimizer.zero_grad()
    return loss


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_gradients(model: OlmoeForCausalLM) -> dict[str, Tensor]:
    """Return the gradient of every parameter, gathered, by name."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = whole(parameter.grad)
    return gradients


def whole_state(model: OlmoeForCausalLM, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return every parameter and AdamW tensor, gathered, by name."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = whole(parameter)
        tensors |= {f"{name}/{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return tensors

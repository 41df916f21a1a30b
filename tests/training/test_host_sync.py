"""Nothing in a training step on one rank waits for the device: no value is read, no size depends on one.

Fake tensors have no values: what reads one raises. tests/distributed/test_communication.py counts the waits
of real ranks, and benchmarks/gpu_step.py has CUDA itself report them.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from olmoe_train.config.choices import ActivationCheckpointing
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.losses import router_losses_from_stats
from tests.support.sizes import SIZES


def fake_step(mode: ActivationCheckpointing, plant: Callable[[Tensor], None] | None = None) -> None:
    """Forward, both kinds of losses, backward, clipping and update, in bf16, with padding."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
    model.set_experts_backend("grouped_mm")
    checkpoint_activations(model, mode)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cpu")
                setattr(module, name, nn.Parameter(fake))
        ids_BS = torch.zeros(2, 32, dtype=torch.long)
        mask_BS = torch.ones(2, 32, dtype=torch.long)
        output = model.training_forward(ids_BS, ids_BS, mask_BS)
        balance, z_loss = router_losses_from_stats(output.router, SIZES["num_experts_per_tok"])
        loss = output.ce_sum / (ids_BS != 1).sum() + balance + z_loss
        if plant is not None:
            plant(loss)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        torch.optim.AdamW(model.parameters(), fused=True).step()


@pytest.mark.parametrize("mode", ActivationCheckpointing)
def test_a_step_reads_no_value(mode: ActivationCheckpointing) -> None:
    fake_step(mode)


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, Tensor.nonzero, bool])
def test_reading_one_would_be_noticed(read: Callable[[Tensor], None]) -> None:
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        fake_step(ActivationCheckpointing.none, plant=read)

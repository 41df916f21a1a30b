"""Log-likelihoods of continuations, over all ranks and in every layout.

Shapes: N requests, S tokens of a pass, P target tokens of a pass, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.evaluation.tasks.prefix_packs import PrefixPack, pack_requests
from olmoe_train.evaluation.tasks.requests import Request
from olmoe_train.model import OlmoeForCausalLM

Packs = Iterable[PrefixPack]
_MULTIPLE = 16
"""Packs are padded to a multiple of this many tokens, as attention kernels on GPUs want it for a mask."""


@torch.no_grad()
def log_likelihoods(
    model: OlmoeForCausalLM,
    requests: Sequence[Request],
    tokens_per_pass: int,
    device: torch.device,
    with_heartbeat: Callable[[Packs], Packs] = iter,
) -> Tensor:
    """Log-likelihood of the continuation of each request. Collective, if there are ranks.

    The packs do not depend on the ranks, and each pack is one forward pass of one rank. Every rank makes
    equally many passes: a sharded model needs that. The model's mode is restored, and no random number is
    drawn.

    Args:
        model: Whole or sharded.
        requests: The same on every rank.
        tokens_per_pass: Greatest number of tokens of a pass; see `pack_requests`.
        device: The device of this rank.
        with_heartbeat: Wraps the packs of this rank, to report progress.

    Returns:
        fp64 [N] on the CPU, in nats, the same on every rank. The log-probabilities are fp32, and their sums
        fp64.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    packs = pack_requests(requests, tokens_per_pass)
    passes = -(-len(packs) // world_size)
    mine = packs[rank::world_size]
    # A rank that has one pass less repeats a pack; its result counts once.
    mine_and_repeated = mine + packs[: passes - len(mine)]
    was_training = model.training
    model.eval()
    sums = [_sums(model, pack, device) for pack in with_heartbeat(mine_and_repeated)]
    model.train(was_training)
    out_N = torch.zeros(len(requests), dtype=torch.float64, device=device)
    for pack, sum_R in zip(mine, sums, strict=False):
        out_N[torch.tensor(pack.requests, device=device)] = sum_R
    if dist.is_initialized():
        dist.all_reduce(out_N)  # exact: all but one of the addends are 0
    return out_N.cpu()


def _sums(model: OlmoeForCausalLM, pack: PrefixPack, device: torch.device) -> Tensor:
    """Log-likelihood of each request of a pack, fp64, on the device; the host does not wait for the GPU."""
    inputs = {name: tensor.to(device) for name, tensor in forward_inputs(pack).items()}
    log_probs_P = model.training_forward(**inputs).log_probs
    assert log_probs_P is not None
    lengths_R = torch.tensor([len(targets) for targets in pack.targets], device=device)
    # unsafe: without it the host reads the lengths back to check that they add up to P.
    return torch.segment_reduce(log_probs_P.double(), "sum", lengths=lengths_R, unsafe=True)


def forward_inputs(pack: PrefixPack) -> dict[str, Tensor]:
    """Arguments of `training_forward`, on the CPU."""
    length = -(-pack.length // _MULTIPLE) * _MULTIPLE
    padding = length - pack.length
    return {
        "input_ids": torch.from_numpy(np.pad(np.concatenate(pack.tokens), (0, padding)).astype(np.int64))[
            None
        ],
        "position_ids": torch.from_numpy(np.pad(np.concatenate(pack.positions), (0, padding)))[None],
        "attention_mask": torch.from_numpy(pack.mask(length))[None, None],
        "targets": torch.from_numpy(np.concatenate(pack.targets).astype(np.int64)),
        "target_positions": torch.from_numpy(np.concatenate(pack.places)),
    }

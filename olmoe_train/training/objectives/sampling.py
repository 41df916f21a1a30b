"""Sample completions on all ranks, with the log-probability of every token and the experts that it went to.

A completion is a function of the weights and of (seed, position of its prompt in the order of the samples,
number within its group) alone: its random numbers do not depend on the batch that it is sampled in.

Shapes: N completions, G of each prompt; S prompt length, C new tokens, T = S + C, V vocabulary, L layers, K
top-k.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.generation import stream_tokens, token_at
from olmoe_train.model.moe.routing_record import OWN_CHOICE, record_routing
from olmoe_train.training.objectives.log_probs import without_dropout


@dataclass(frozen=True)
class Completions:
    """Completions of N prompts."""

    tokens_NC: Tensor
    """int64; the padding token after the end of a completion."""
    lengths_N: Tensor
    """int64: tokens of each completion, its eos included."""
    log_probs_NC: Tensor
    """fp32, of the distribution that the tokens were sampled from."""
    experts_LNTK: Tensor
    """int64: the experts of every token of prompt and completion; OWN_CHOICE for the last token, which no
    pass has read."""


class Draws:
    """The random numbers of N completions."""

    def __init__(self, keys: Sequence[tuple[int, ...]], tokens: int, device: torch.device) -> None:
        """
        Args:
            keys: What each completion's numbers are a function of.
            tokens: Numbers per completion (C).
            device: Where the numbers go.
        """
        rows = [np.random.Generator(np.random.Philox(key=_key(key))).random(tokens) for key in keys]
        self.uniform_NC = torch.from_numpy(np.stack(rows)).to(device)

    def choose(self, log_probs_NV: Tensor, position: int) -> Tensor:
        """The tokens at a position: the first whose cumulative probability passes the uniform number."""
        return token_at(log_probs_NV, self.uniform_NC[:, position])


def _key(parts: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def sample_completions(
    model: OlmoeForCausalLM,
    input_ids_NS: Tensor,
    mask_NS: Tensor,
    max_new_tokens: int,
    draws: Draws | None,
) -> Completions:
    """Continue every prompt. Collective: the ranks make equally many passes, until all their completions end.

    Args:
        model: Whole or sharded.
        input_ids_NS: int64, padded on the left.
        mask_NS: int64, 0 at padding.
        max_new_tokens: C.
        draws: Random numbers; None decodes greedily.
    """
    log_probs: list[Tensor] = []

    def draw(logits_NV: Tensor) -> Tensor:
        log_probs_NV = F.log_softmax(logits_NV, -1)
        at = len(log_probs)
        token_N = log_probs_NV.argmax(-1) if draws is None else draws.choose(log_probs_NV, at)
        log_probs.append(log_probs_NV.gather(1, token_N[:, None]).squeeze(1))
        return token_N

    with without_dropout(model), record_routing(model) as passes_L:
        streamed = stream_tokens(
            model, input_ids_NS, max_new_tokens, mask_NS, draw=draw, all_ended=_on_all_ranks
        )
        tokens_NC = torch.stack(list(streamed), 1)
    return Completions(
        tokens_NC,
        _lengths(tokens_NC, model.config.eos_token_id),
        torch.stack(log_probs, 1),
        _experts(passes_L, len(input_ids_NS), input_ids_NS.shape[1], tokens_NC.shape[1]),
    )


def _on_all_ranks(ended_N: Tensor) -> bool:
    running = (~ended_N).sum()
    if dist.is_initialized():
        dist.all_reduce(running)
    return not bool(running)


def _lengths(tokens_NC: Tensor, eos_token_id: int | list[int] | None) -> Tensor:
    ends = torch.as_tensor([] if eos_token_id is None else eos_token_id, device=tokens_NC.device)
    is_end_NC = torch.isin(tokens_NC, ends)
    width = tokens_NC.shape[1]
    return torch.where(is_end_NC.any(1), is_end_NC.int().argmax(1) + 1, width)


def _experts(passes_L: list[list[Tensor]], completions: int, prompt: int, new: int) -> Tensor:
    """Put the passes of one decoding together: the prompt's, then one per token but the last."""
    layers = []
    for prefill_TK, *steps in passes_L:
        prefill_NSK = prefill_TK.view(completions, prompt, -1)
        after = torch.full_like(prefill_NSK[:, :1], OWN_CHOICE)
        steps_NCK = [step_NK[:, None] for step_NK in steps[: new - 1]]
        layers.append(torch.cat([prefill_NSK, *steps_NCK, after], 1))
    return torch.stack(layers)

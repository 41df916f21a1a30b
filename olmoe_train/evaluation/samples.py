"""Continue the prompts of the configuration, greedily: what a model says, beside its losses.

Shapes: N prompts, S longest prompt.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from olmoe_train.distributed.collectives import on_any_rank
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.generation import stop_tokens, stream_tokens
from olmoe_train.utils.errors import UserError

Tokens = Iterable[Tensor]


def sample_prompts(
    model: OlmoeForCausalLM,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    device: torch.device,
    with_heartbeat: Callable[[Tokens], Tokens] = iter,
) -> list[dict[str, str]]:
    """Continue every prompt with the most likely tokens. Collective, if there are ranks.

    Each rank continues all prompts, and all ranks make equally many passes. The model's mode is restored, and
    no random number is drawn.

    Args:
        model: Whole or sharded.
        tokenizer: Encodes the prompts and decodes the continuations.
        prompts: N texts.
        max_new_tokens: Longest continuation, in tokens.
        device: The device of this rank.
        with_heartbeat: Wraps the tokens, to report progress to the watchdog.

    Returns:
        {"prompt", "completion"} per prompt. A completion ends before the end-of-text token.

    Raises:
        UserError: A prompt is empty, or a logit is not finite.
    """
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    for index, row in enumerate(ids):
        if not row:
            raise UserError(f"evaluation.prompts[{index}]: is empty; give some text to continue")
    longest = max(map(len, ids))
    ids_NS = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=device)
    mask_NS = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    was_training = model.training
    model.eval()
    try:
        streamed = stream_tokens(model, ids_NS, max_new_tokens, mask_NS, all_ended=_on_all_ranks)
        tokens = torch.stack(list(with_heartbeat(streamed)), 1).tolist()
    finally:
        model.train(was_training)
    stops = stop_tokens(model)
    completions = []
    for row in tokens:
        end = next((at for at, token in enumerate(row) if token in stops), len(row))
        completions.append(tokenizer.decode(row[:end]))
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, completions, strict=True)]


def _on_all_ranks(ended_N: Tensor) -> bool:
    all_ended = bool(ended_N.all())
    return not on_any_rank(not all_ended) if dist.is_initialized() else all_ended

"""Decoding: continue token sequences with any model that returns logits and keeps a key/value cache.

Shapes: B batch, S prompt length, C cached and new tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.hf.special_tokens import generation_defaults
from olmoe_train.model.kv_cache import KVCache
from olmoe_train.utils.errors import UserError

# Transformers' default, where neither max_new_tokens nor max_length is given.
DEFAULT_NEW_TOKENS = 20


class LanguageModel(Protocol):
    """What decoding needs of a model: OlmoeForCausalLM is one."""

    config: OlmoeConfig
    generation_config: dict[str, Any] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns an output with `logits` [B, S, V]; arguments as OlmoeForCausalLM.forward."""


def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    attention_mask: Tensor | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of input_ids [B, S] int64; returns prompt and continuation, [B, up to S +
    max_new_tokens].

    Greedy, token for token as Transformers' generate, unless `temperature` is above 0 or `do_sample` is
    true; then the softmax at that temperature (default 1), cut to the `top_k` likeliest tokens and then to
    the fewest whose probabilities reach `top_p`. A row ends with an `eos_token_id` (one or several; default
    generation_config.json's, without such a file the config's; []: none) and is then filled with
    `pad_token_id`. attention_mask [B, S]: 0 at padding, which must be on the left; by default the pad tokens
    of input_ids, where padding is no eos. UserError for arguments that make no sense.
    """
    if max_new_tokens is None:
        max_new_tokens = DEFAULT_NEW_TOKENS if max_length is None else max_length - input_ids.shape[1]
    tokens = stream_tokens(
        model,
        input_ids,
        max_new_tokens,
        attention_mask,
        sampling_temperature(do_sample, temperature),
        top_k,
        top_p,
        eos_token_id,
        pad_token_id,
        generator,
    )
    return torch.cat([input_ids, *(token_B[:, None] for token_B in tokens)], dim=1)


def sampling_temperature(do_sample: bool | None, temperature: float | None) -> float:
    """0 for greedy decoding."""
    if do_sample is None:
        return temperature or 0.0
    return (temperature or 1.0) if do_sample else 0.0


@torch.no_grad()
def stream_tokens(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The next token of every row, [B] int64, as it is decided, until all rows have ended. Arguments as
    generate()."""
    _check(input_ids, max_new_tokens, temperature, top_k, top_p)
    # Where there is a generation_config.json, it alone speaks, as in Transformers.
    defaults = model.generation_config or generation_defaults(model.config)
    stops = _ids(defaults.get("eos_token_id") if eos_token_id is None else eos_token_id)
    pad = defaults.get("pad_token_id") if pad_token_id is None else pad_token_id
    mask_BC = _padding_mask(input_ids, attention_mask, pad, stops)
    filler = pad if pad is not None else (stops or [0])[0]
    stop_ids = torch.tensor(stops, dtype=torch.long, device=input_ids.device)
    ended_B = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    position_BS = None
    if mask_BC is not None:
        position_BS = (mask_BC.cumsum(1) - 1).clamp(min=0)
        mask_BC = F.pad(mask_BC, (0, max_new_tokens), value=1)  # made once, not grown by every token
    cache, new_BS = KVCache(), input_ids
    for length in range(input_ids.shape[1], input_ids.shape[1] + max_new_tokens):
        output = model(
            new_BS,
            None if mask_BC is None else mask_BC[:, :length],
            position_BS,
            cache,
            use_cache=True,
            output_router_logits=False,
            logits_to_keep=1,
            return_dict=True,
        )
        token_B = choose(output.logits[:, -1].float(), temperature, top_k, top_p, generator)
        if stops:
            token_B = token_B.masked_fill(ended_B, filler)
            ended_B |= torch.isin(token_B, stop_ids)
        yield token_B
        if stops and ended_B.all():
            return
        new_BS = token_B[:, None]
        if position_BS is not None:
            position_BS = position_BS[:, -1:] + 1


def choose(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row, [B] int64, from fp32 logits: the likeliest (temperature 0), or a draw."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        smallest_kept_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept_B1, -torch.inf)
    if top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        probability_BV = sorted_BV.softmax(-1)
        # Kept: every token before which the likelier ones do not yet reach top_p.
        enough_BV = probability_BV.cumsum(-1) - probability_BV >= top_p
        logits_BV = logits_BV.masked_fill(enough_BV.scatter(-1, order_BV, enough_BV), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)


def _check(
    input_ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UserError(f"input_ids has shape {list(input_ids.shape)}: give [batch, at least one token]")
    if max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens} must be at least 1 (max_length counts the prompt too)"
        )
    if temperature < 0:
        raise UserError(f"temperature={temperature} must not be negative; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1, or null")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1, or null")


def _ids(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _padding_mask(
    input_ids: Tensor, attention_mask: Tensor | None, pad: int | None, stops: list[int]
) -> Tensor | None:
    """int64 [B, S], 0 at padding; None where there is none. UserError where a row ends with padding."""
    if attention_mask is None:
        if pad is None or pad in stops:
            return None
        attention_mask = input_ids != pad
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}: give "
            "one value a token"
        )
    mask_BS = attention_mask.long()
    if not mask_BS[:, -1].all():
        raise UserError("a row of input_ids ends with padding: pad on the left, so that every row goes on")
    return None if mask_BS.all() else mask_BS

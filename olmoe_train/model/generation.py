"""Decoding: continue token sequences with any model that returns logits and has a key/value cache.

Shapes: B batch, S prompt length, C cached and new tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.hf.special_tokens import generation_defaults
from olmoe_train.model.kv_cache import KVCache
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.finite import first_not_finite

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 20
"""Tokens to add if neither max_new_tokens nor max_length is given; the default of Transformers."""


Draw = Callable[[Tensor], Tensor]
"""Logits, fp32 [B, V] -> the next token of every row, int64 [B]."""
AllEnded = Callable[[Tensor], bool]
"""Which rows have ended, bool [B] -> whether to stop."""


class LanguageModel(Protocol):
    """What decoding needs from a model. OlmoeForCausalLM has it."""

    config: OlmoeConfig
    generation_config: dict[str, Any] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the arguments of OlmoeForCausalLM.forward; returns an output with `logits` [B, S, V]."""


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
    """Continue each row of a batch of prompts.

    Greedy decoding gives the same tokens as Transformers' generate. Sampling draws from the softmax at the
    given temperature, restricted first to the `top_k` most likely tokens, and then to the fewest tokens whose
    probabilities reach `top_p`.

    Args:
        model: The model, usually an OlmoeForCausalLM.
        input_ids: Prompts, int64 [B, S].
        max_new_tokens: Most tokens to add to a row.
        max_length: Most tokens of a row, prompt included; used if `max_new_tokens` is None.
        attention_mask: [B, S], 0 at padding, which must be on the left. None: padding is wherever `input_ids`
            is `pad_token_id`, provided that `pad_token_id` is not an end-of-text token.
        do_sample: Sample instead of decoding greedily. None: sample if `temperature` is above 0.
        temperature: Temperature of the softmax. None: 1 for sampling.
        top_k: Number of most likely tokens to sample from. None: all.
        top_p: Probability that the tokens to sample from must reach. None: 1.
        eos_token_id: End-of-text tokens, one or several, after which a row ends; []: none. None: those of
            generation_config.json, or of the model's configuration if there is no such file.
        pad_token_id: Token that fills a row that has ended. None: as for `eos_token_id`.
        generator: Random generator for sampling. None: torch's default generator.

    Returns:
        Prompts and continuations, int64 [B, up to S + max_new_tokens].

    Raises:
        UserError: An argument is invalid, a row ends with padding, or a logit is not finite.
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
    added = [token_B[:, None] for token_B in tokens]
    stops, pad = _special_tokens(model, eos_token_id, pad_token_id)
    mask_BS = _padding_mask(input_ids, attention_mask, pad, stops)
    longest = input_ids.shape[1] if mask_BS is None else int(mask_BS.sum(1).max())
    warn_of_length(model.config, longest + len(added))
    return torch.cat([input_ids, *added], dim=1)


def sampling_temperature(do_sample: bool | None, temperature: float | None) -> float:
    """The temperature that generate's arguments mean; 0: greedy decoding."""
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
    cache: KVCache | None = None,
    draw: Draw | None = None,
    all_ended: AllEnded | None = None,
) -> Iterator[Tensor]:
    """Decode one token per row at a time, until all rows have ended.

    Args:
        temperature: Temperature of the softmax; 0: greedy decoding. All others are those of `generate`.
        cache: Keys and values of the first tokens of `input_ids`, fewer than S, which are not computed again.
            Those of all further tokens but the last are appended. None: a new cache.
        draw: Chooses the tokens, in place of `temperature`, `top_k`, `top_p` and `generator`.
        all_ended: Decides when to stop. A sharded model needs equally many passes on all ranks, so the
            decision must be the same there. None: stop when all rows have ended.

    Yields:
        The next token of every row, int64 [B]; the padding token for rows that have ended.

    Raises:
        UserError: As `generate`.
    """
    refuse_expert_choice(model.config)
    _check_arguments(input_ids, max_new_tokens, temperature, top_k, top_p)
    stops, pad = _special_tokens(model, eos_token_id, pad_token_id)
    mask_BC = _padding_mask(input_ids, attention_mask, pad, stops)
    filler = pad if pad is not None else (stops or [0])[0]
    stop_ids = torch.tensor(stops, dtype=torch.long, device=input_ids.device)
    ended_B = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    cache = KVCache() if cache is None else cache
    cached = cache.get_seq_length()
    position_BS = None
    if mask_BC is not None:
        position_BS = (mask_BC.cumsum(1) - 1).clamp(min=0)[:, cached:]
        mask_BC = F.pad(mask_BC, (0, max_new_tokens), value=1)  # for all tokens at once; the loop slices it
    new_BS = input_ids[:, cached:]
    for step in range(max_new_tokens):
        length = input_ids.shape[1] + step
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
        logits_BV = output.logits[:, -1].float()
        _check_finite(logits_BV, length, output.logits.dtype)
        if draw is None:
            token_B = sample_token(logits_BV, temperature, top_k, top_p, generator)
        else:
            token_B = draw(logits_BV)
        if stops:
            token_B = token_B.masked_fill(ended_B, filler)
            ended_B |= torch.isin(token_B, stop_ids)
        yield token_B
        if stops and (ended_B.all() if all_ended is None else all_ended(ended_B)):
            return
        new_BS = token_B[:, None]
        if position_BS is not None:
            position_BS = position_BS[:, -1:] + 1


def sample_token(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits_BV: Logits of the next token, fp32 [B, V].
        temperature: Temperature of the softmax. 0: take the most likely token.
        top_k, top_p, generator: As for `generate`.

    Returns:
        Token ids, int64 [B].
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    probability_BV = restrict(logits_BV, temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probability_BV, 1, generator=generator).squeeze(-1)


def restrict(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Divide logits by the temperature, and give those that are not to be sampled the value -inf.

    Args:
        logits_BV: fp32 [B, V].
        temperature: Above 0.
        top_k, top_p: As for `generate`.

    Returns:
        The logits to sample from, fp32 [B, V].
    """
    logits_BV = logits_BV / temperature
    if top_k is not None:
        smallest_kept_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept_B1, -torch.inf)
    if top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        probability_BV = sorted_BV.softmax(-1)
        # A token is dropped if the more likely ones already reach top_p, so the first token is always kept.
        dropped_BV = probability_BV.cumsum(-1) - probability_BV >= top_p
        logits_BV = logits_BV.masked_fill(dropped_BV.scatter(-1, order_BV, dropped_BV), -torch.inf)
    return logits_BV


def token_at(log_probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Sample from given random numbers: the first token whose cumulative probability passes the number.

    Args:
        log_probs_BV: Logarithms of the probabilities.
        uniform_B: fp64, uniform in [0, 1).

    Returns:
        Token ids, int64 [B].
    """
    cumulative_BV = log_probs_BV.double().exp().cumsum(-1)
    point_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, point_B1, right=True)
    return token_B1.clamp(max=log_probs_BV.shape[1] - 1).squeeze(1)


def refuse_expert_choice(config: OlmoeConfig) -> None:
    """Refuse to decode with a model whose experts choose tokens.

    Raises:
        UserError: They do.
    """
    if config.routing == "expert_choice":
        raise UserError(
            "model.routing=expert_choice: the model cannot generate text, because its experts choose among "
            "all tokens of a sequence, and those after a token are not known yet; train with "
            "model.routing=token_choice"
        )


def _check_arguments(
    input_ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UserError(
            f"input_ids has shape {list(input_ids.shape)}; it must have two dimensions, [batch, tokens], and "
            "at least one token"
        )
    if max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens} must be at least 1 (max_length counts the prompt, too)"
        )
    check_sampling(temperature, top_k, top_p)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise a UserError if an option of sampling has no meaning."""
    if temperature < 0:
        raise UserError(f"temperature={temperature} must not be negative; 0 means greedy decoding")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1, or null")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1, or null")


def warn_of_length(config: OlmoeConfig, tokens: int) -> None:
    """Log a warning if a text without its last token, which was not fed, is too long for the model.

    Args:
        config: Configuration of the model.
        tokens: Number of tokens of the text.
    """
    if tokens - 1 > config.max_position_embeddings:
        log.warning(
            "warning: the text is longer than the model's max_position_embeddings=%d: it is not made for "
            "positions beyond",
            config.max_position_embeddings,
        )


def stop_tokens(model: LanguageModel) -> list[int]:
    """End-of-text tokens of generation_config.json, or of the model's configuration without such a file."""
    return end_tokens(model, None)


def end_tokens(model: LanguageModel, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The end-of-text tokens that generate's argument means."""
    return _special_tokens(model, eos_token_id, None)[0]


def _special_tokens(
    model: LanguageModel, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[list[int], int | None]:
    """(end-of-text tokens, padding token), by the defaults of the model where an argument is None."""
    # If there is a generation_config.json, the model's configuration is not consulted, as in Transformers.
    defaults = model.generation_config or generation_defaults(model.config)
    eos = defaults.get("eos_token_id") if eos_token_id is None else eos_token_id
    pad = defaults.get("pad_token_id") if pad_token_id is None else pad_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos), pad


def _check_finite(logits_BV: Tensor, length: int, dtype: torch.dtype) -> None:
    """Raise a UserError that names the first logit that is not finite, after `length` tokens."""
    if found := first_not_finite(logits_BV):
        raise UserError(
            f"after {length} tokens, logits{found} (row, token): the weights are damaged, or {dtype} cannot "
            "hold what the model computes"
        )


def _padding_mask(
    input_ids: Tensor, attention_mask: Tensor | None, pad: int | None, stops: list[int]
) -> Tensor | None:
    """The padding mask, int64 [B, S], 0 at padding. None: there is no padding.

    Raises:
        UserError: A row ends with padding, or the mask has another shape than `input_ids`.
    """
    if attention_mask is None:
        if pad is None or pad in stops:
            return None
        attention_mask = input_ids != pad
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}, and input_ids {list(input_ids.shape)}; "
            "give one value per token"
        )
    mask_BS = attention_mask.long()
    if not mask_BS[:, -1].all():
        raise UserError("a row of input_ids ends with padding; pad on the left, so that every row continues")
    return None if mask_BS.all() else mask_BS

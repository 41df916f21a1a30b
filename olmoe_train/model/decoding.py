"""Decoding many prompts with continuous batching: a row that ends makes place for the next prompt at once.

Every pass of the model is one of two kinds. A prefill reads new prompts, laid end to end, each of which sees
only itself, and stores their keys and values as new rows of the cache. A step reads one token of every row,
each at its own position. In both, the experts get the tokens of all rows together, and there is no padding.

Shapes: B rows, T tokens of the new prompts, C positions of the longest row, V vocabulary.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.model.attention import document_mask, documents_and_positions
from olmoe_train.model.generation import (
    DEFAULT_NEW_TOKENS,
    LanguageModel,
    check_sampling,
    end_tokens,
    refuse_expert_choice,
    restrict,
    sampling_temperature,
    token_at,
    warn_of_length,
)
from olmoe_train.model.kv_cache import KVCache, RowCache
from olmoe_train.model.rope import TYPES_THAT_DEPEND_ON_LENGTH
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.finite import first_not_finite

BATCH_SIZE = 16
"""Most rows that are decoded together, unless it is given."""
MAX_BATCH_TOKENS = 16384
"""Most positions of the cache, unless it is given. OLMoE-1B-7B keeps 128 KiB per position in bf16: 2 GiB."""
PREFILL_TOKENS = 512
"""A prefill takes a further prompt only up to this number of tokens: attention computes all pairs of its
tokens."""


@dataclass(frozen=True)
class Prompt:
    """What one row continues."""

    tokens: Sequence[int]
    max_new_tokens: int
    stops: frozenset[int] = frozenset()
    """Tokens that end the completion."""
    seed: str = ""
    """Sampling draws the random numbers of this seed, whatever the other rows are."""
    name: str = "prompt"
    """For error messages."""

    @property
    def positions(self) -> int:
        """Most positions that the row takes in the cache. Its last token is not fed to the model."""
        return len(self.tokens) + self.max_new_tokens - 1


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    index: int
    """Place of its prompt among the prompts."""
    tokens: list[int]
    """With the token that ended it, if one did."""
    is_stopped: bool
    """Whether one of `stops` ended it, and not `max_new_tokens`."""


@dataclass
class _Row:
    index: int
    prompt: Prompt
    generator: random.Random
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.tokens)

    @property
    def is_stopped(self) -> bool:
        return self.tokens[-1] in self.prompt.stops

    @property
    def has_ended(self) -> bool:
        return self.is_stopped or len(self.tokens) == self.prompt.max_new_tokens


@torch.no_grad()
def complete(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[Completion]:
    """Continue every prompt with the tokens that it would get alone.

    Rounding depends on the batch, so this holds for tokens whose logits are not almost equal.

    Args:
        model: The model, usually an OlmoeForCausalLM.
        prompts: The prompts; a prompt starts when the one before it has started.
        device: Where the model is.
        batch_size: Most rows that are decoded together. With RoPE types whose frequencies depend on the
            length (dynamic, longrope), rows are decoded alone.
        max_batch_tokens: Most positions of the cache: rows times the most positions that one of them takes.
        temperature, top_k, top_p: As for `stream_tokens`.

    Yields:
        Completions, each as soon as it has ended.

    Raises:
        UserError: An argument is invalid, or a logit is not finite.
    """
    refuse_expert_choice(model.config)
    check_sampling(temperature, top_k, top_p)
    check_prompts(prompts, batch_size, max_batch_tokens)
    if model.config.rope_parameters["rope_type"] in TYPES_THAT_DEPEND_ON_LENGTH:
        batch_size = 1
    waiting = deque(enumerate(prompts))
    rows: list[_Row] = []
    cache, longest = RowCache(), 0
    while waiting or rows:
        new = _next_prompts(waiting, rows, batch_size, max_batch_tokens)
        if new:
            positions = max(row.prompt.positions for row in (*rows, *new))
            capacity = min(batch_size, max_batch_tokens // positions)
            logits_BV = _prefill(model, new, device, cache, len(rows), capacity, positions)
            rows += new
        else:
            new = rows
            logits_BV = _step(model, rows, device, cache)
        _check_finite(logits_BV, new)
        tokens = _choose(logits_BV.float(), new, temperature, top_k, top_p)
        for row, token in zip(new, tokens, strict=True):
            row.tokens.append(token)
        for at in reversed(range(len(rows))):  # backwards: the last row, which fills the gap, has not ended
            if (row := rows[at]).has_ended:
                longest = max(longest, row.length)
                last = rows.pop()
                if last is not row:
                    cache.move(len(rows), at, last.length - 1)
                    rows[at] = last
                yield Completion(row.index, row.tokens, row.is_stopped)
    warn_of_length(model.config, longest)


def check_prompts(prompts: Sequence[Prompt], batch_size: int, max_batch_tokens: int) -> None:
    """Check that every prompt can be continued.

    Raises:
        UserError: One cannot; the message has one line per such prompt, of at most ten.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    wrong = []
    for one in prompts:
        if not one.tokens:
            wrong.append(f"{one.name}: the prompt is empty; give some text to continue")
        elif one.max_new_tokens < 1:
            wrong.append(f"{one.name}: max_new_tokens={one.max_new_tokens} must be at least 1")
        elif one.positions > max_batch_tokens:
            wrong.append(
                f"{one.name}: {len(one.tokens)} tokens and max_new_tokens={one.max_new_tokens} need "
                f"{one.positions} positions, but max_batch_tokens={max_batch_tokens}; raise the latter, or "
                "shorten the former"
            )
    raise_first(wrong)


def raise_first(wrong: list[str], most: int = 10) -> None:
    """Raise a UserError with the first messages, if there are any."""
    if wrong:
        more = [f"and {len(wrong) - most} more"] if len(wrong) > most else []
        raise UserError("\n  ".join([*wrong[:most], *more]))


def _next_prompts(
    waiting: deque[tuple[int, Prompt]], rows: list[_Row], batch_size: int, max_batch_tokens: int
) -> list[_Row]:
    """Take the prompts that the next pass reads from `waiting`. No prompts: the next pass is a step."""
    new: list[_Row] = []
    tokens = 0
    positions = max((row.prompt.positions for row in rows), default=0)
    while waiting and len(rows) + len(new) < batch_size:
        index, prompt = waiting[0]
        tokens += len(prompt.tokens)
        positions = max(positions, prompt.positions)
        if (len(rows) + len(new) + 1) * positions > max_batch_tokens or (new and tokens > PREFILL_TOKENS):
            break
        waiting.popleft()
        new.append(_Row(index, prompt, random.Random(prompt.seed)))
    return new


def _prefill(
    model: LanguageModel,
    new: list[_Row],
    device: torch.device,
    cache: RowCache,
    used: int,
    capacity: int,
    positions: int,
) -> Tensor:
    """Read the prompts of new rows. Returns the logits after each of them, [B, V]."""
    lengths = [len(row.prompt.tokens) for row in new]
    ids_1T = torch.tensor([[token for row in new for token in row.prompt.tokens]], device=device)
    offsets = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).to(torch.int32)
    mask = position_1T = None
    if len(new) > 1:
        document_1T, position_1T = documents_and_positions(offsets, *ids_1T.shape)
        mask = document_mask(document_1T)
    packed = KVCache()
    logits = _logits(model, ids_1T, mask, position_1T, packed, logits_to_keep=offsets[1:].long() - 1)
    cache.add(packed, lengths, used, capacity, positions)
    return logits[0]


def _step(model: LanguageModel, rows: list[_Row], device: torch.device, cache: RowCache) -> Tensor:
    """Read the last token of every row. Returns the logits after it, [B, V]."""
    longest = max(row.length for row in rows)
    ids_B1 = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
    position_B1 = torch.tensor([[row.length - 1] for row in rows], device=device)
    mask_BC = torch.arange(longest, device=device) <= position_B1
    at_positions = cache.at(position_B1[:, 0], longest)
    return _logits(model, ids_B1, mask_BC[:, None, None], position_B1, at_positions, logits_to_keep=1)[:, 0]


def _logits(
    model: LanguageModel, ids: Tensor, mask: Tensor | None, position: Tensor | None, cache: Any, **keep: Any
) -> Tensor:
    options = {"use_cache": True, "output_router_logits": False, "return_dict": True, **keep}
    logits: Tensor = model(ids, mask, position, cache, **options).logits
    return logits


def _choose(
    logits_BV: Tensor, rows: list[_Row], temperature: float, top_k: int | None, top_p: float | None
) -> list[int]:
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    log_probs_BV = restrict(logits_BV, temperature, top_k, top_p).log_softmax(-1)
    uniform_B = torch.tensor([row.generator.random() for row in rows], dtype=torch.float64)
    return token_at(log_probs_BV, uniform_B.to(logits_BV.device)).tolist()


def _check_finite(logits_BV: Tensor, rows: list[_Row]) -> None:
    if found := first_not_finite(logits_BV):
        # One prompt cannot be blamed: attention multiplies by 0 what the others of a prefill hide from it.
        names = ", ".join(row.prompt.name for row in rows[:4]) + (", ..." if len(rows) > 4 else "")
        raise UserError(
            f"logits{found} (row, token) of the rows {names}: the weights are damaged, or {logits_BV.dtype} "
            "cannot hold what the model computes"
        )


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue prompts of any lengths with continuous batching.

    Args:
        model: The model, usually an OlmoeForCausalLM.
        prompts: Token ids of each prompt, without padding.
        device: Where the model is.
        max_new_tokens: Most tokens to add to a prompt.
        batch_size, max_batch_tokens: As for `complete`.
        do_sample, temperature, top_k, top_p, eos_token_id: As for `generate`.
        seed: What a prompt draws is a function of this and of its place among the prompts.

    Returns:
        The new tokens of each prompt, the end-of-text token included.

    Raises:
        UserError: As `complete`.
    """
    stops = frozenset(end_tokens(model, eos_token_id))
    given = [
        Prompt(one, max_new_tokens, stops, f"{seed} {index}", f"prompts[{index}]")
        for index, one in enumerate(prompts)
    ]
    chosen = sampling_temperature(do_sample, temperature)
    completions = complete(model, given, device, batch_size, max_batch_tokens, chosen, top_k, top_p)
    return [one.tokens for one in sorted(completions, key=lambda one: one.index)]

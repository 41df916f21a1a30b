"""Encodes the sides of a preference, cuts them to the sequence length, and leaves records out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from olmoe_train.config.choices import Truncate
from olmoe_train.data.prepare.loss_mask import align_spans, mark_targets
from olmoe_train.data.prepare.records import Document

LEFT_OUT = ("too_long", "unaligned", "equal_when_cut")
"""Why records are left out, by the names that the manifest gives the counts."""
PREFERENCE_COUNTS = (*LEFT_OUT, "cut", "desirable")


@dataclass(frozen=True)
class EncodedSide:
    """A prompt with one completion."""

    ids: list[int]
    """With the eos."""
    targets: np.ndarray
    """Loss mask, uint8 per token: 1 for a token of the completion that is compared."""
    prompt_tokens: int


def encode_side(
    document: Document, ids: list[int], eos_token_id: int, encode: Callable[[str], list[int]]
) -> EncodedSide | None:
    """Find the prompt and the completion among the tokens of a document.

    Args:
        document: The side.
        ids: Its token ids.
        eos_token_id: Ends it.
        encode: Encodes a text without special tokens.

    Returns:
        The side. None: a boundary is inside a token, or the chat template does not allow finding it.
    """
    if document.target_spans is None:
        return None
    prompt = (0, document.prompt_end)
    found = align_spans(document.text, [prompt, *document.target_spans], ids, encode)
    if found is None:
        return None
    (_, prompt_tokens), *spans = found
    ids, targets = mark_targets(ids, spans, eos_token_id, document.learns_eos)
    return EncodedSide(ids, targets, prompt_tokens)


def compare_sides(
    sides: list[EncodedSide | None], truncate: Truncate, length: int
) -> tuple[list[EncodedSide], str | None]:
    """Cut a record's sides to `length` tokens.

    Args:
        sides: The chosen and the rejected side, or the one side of a completion with a label.
        truncate: How.
        length: Greatest number of tokens of a side.

    Returns:
        (The sides, none if the record is left out; the name out of PREFERENCE_COUNTS that counts it).
    """
    found = [side for side in sides if side is not None]
    if len(found) < len(sides):
        return [], "unaligned"
    # A chat template may render one prompt differently before two completions.
    if any(side.ids[: side.prompt_tokens] != found[0].ids[: found[0].prompt_tokens] for side in found[1:]):
        return [], "unaligned"
    longest = max(len(side.ids) for side in found)
    if longest <= length:
        return found, None
    if truncate is Truncate.prompt_start:
        cut = [_cut(side, longest - length, len(side.ids)) for side in found]
    else:
        cut = [_cut(side, 0, length) for side in found]
    if truncate is Truncate.drop or any(side.prompt_tokens < 1 or not side.targets.any() for side in cut):
        return [], "too_long"
    if len(cut) == 2 and cut[0].ids == cut[1].ids:
        return [], "equal_when_cut"
    return cut, "cut"


def _cut(side: EncodedSide, start: int, stop: int) -> EncodedSide:
    """Tokens [start, stop) of a side. The first token has no token before it that could predict it."""
    targets = side.targets[start:stop].copy()
    targets[:1] = 0
    return EncodedSide(side.ids[start:stop], targets, side.prompt_tokens - start)

"""Finds the training targets of a document among its tokens, and builds the loss mask."""

from collections.abc import Callable

import numpy as np

from olmoe_train.data.chat_template import Span


def align_spans(
    text: str, spans: list[Span], ids: list[int], encode: Callable[[str], list[int]]
) -> list[Span] | None:
    """Convert spans of characters into spans of tokens.

    A boundary is accepted only if encoding the text before it, on its own, gives the tokens that `ids` begins
    with. Then no token straddles the boundary, and the model is trained to continue exactly the tokens that
    it is given as a prompt. The offsets of a tokenizer would be cheaper but prove less: those of byte-level
    tokenizers leave out the space that a token begins with, and they do not say how the prompt is encoded on
    its own.

    Args:
        text: The document.
        spans: Spans [start, end) in characters of `text`.
        ids: Token ids of `text`.
        encode: Encodes a text without special tokens.

    Returns:
        The spans [start, end) in tokens of `ids`. None if a boundary is not accepted.
    """
    token_of = {len(text): len(ids)}
    for boundary in sorted({place for span in spans for place in span} - token_of.keys()):
        before = encode(text[:boundary])
        if ids[: len(before)] != before:
            return None
        token_of[boundary] = len(before)
    return [(token_of[start], token_of[end]) for start, end in spans]


def mark_targets(
    ids: list[int], spans: list[Span] | None, eos_token_id: int, eos_is_target: bool
) -> tuple[list[int], np.ndarray]:
    """End a document with eos and build its loss mask.

    Args:
        ids: Token ids of the document.
        spans: Spans of targets in tokens. None: they are unknown, and no token becomes a target.
        eos_token_id: Appended unless the document ends with it already.
        eos_is_target: Whether an appended eos is a target. It is not if the spans are unknown.

    Returns:
        (ids with the final eos, uint8 per token: 1 for a target, else 0).
    """
    targets = np.zeros(len(ids), np.uint8)
    for start, end in spans or ():
        targets[start:end] = 1
    if ids and ids[-1] == eos_token_id:
        return ids, targets
    return [*ids, eos_token_id], np.append(targets, np.uint8(eos_is_target and spans is not None))

"""Which tokens of a conversation are to be predicted: its assistant's turns, found again among the tokens."""

from collections.abc import Callable

import numpy as np

from olmoe_train.data.chat_template import Span


def align(
    text: str, turns: list[Span], ids: list[int], encode: Callable[[str], list[int]]
) -> list[Span] | None:
    """The turns, characters of `text`, as tokens [start, end) of `ids`, which are the tokens of `text`.

    None where a boundary cannot be proven: the text before it, tokenised alone, must give the tokens that
    `ids` begins with. So no token straddles it, and the model is trained to go on from the very tokens that
    it is given as a prompt. A tokenizer's offsets would be cheaper and prove less: byte-level ones leave out
    the space that a token begins with, and whether a prompt by itself has these tokens they do not say.
    """
    places = {len(text): len(ids)}
    for boundary in sorted({place for turn in turns for place in turn} - places.keys()):
        before = encode(text[:boundary])
        if ids[: len(before)] != before:
            return None
        places[boundary] = len(before)
    return [(places[start], places[end]) for start, end in turns]


def mark_targets(
    ids: list[int], turns: list[Span] | None, eos_token_id: int, learn_eos: bool
) -> tuple[list[int], np.ndarray]:
    """(`ids`, ended by eos; uint8 a token: 1 where it is to be predicted). turns: in tokens; None: unknown.

    learn_eos: an eos that has to be added is a target too, unless the turns are unknown.
    """
    targets = np.zeros(len(ids), np.uint8)
    for start, end in turns or ():
        targets[start:end] = 1
    if ids and ids[-1] == eos_token_id:
        return ids, targets
    return [*ids, eos_token_id], np.append(targets, np.uint8(learn_eos and turns is not None))

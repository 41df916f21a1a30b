"""The tokens of a task's questions: one request per choice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from olmoe_train.evaluation.tasks.task import Task
from olmoe_train.model import OlmoeConfig
from olmoe_train.utils.errors import UserError

Tokens = NDArray[np.int32]
_PAIRS_AT_ONCE = 4096  # bounds the memory of encodings, of some KB per text


@dataclass(frozen=True)
class Request:
    """A continuation whose log-likelihood is asked for."""

    tokens: Tokens
    """int32: the context, then the continuation. There is a token before the continuation."""
    targets: int
    """Number of tokens of the continuation."""


@dataclass(frozen=True)
class EncodedTask:
    task: Task
    requests: list[Request]
    """One per choice, in the order of the questions and of their choices."""
    cut_contexts: int
    """Requests whose context lost its beginning, because they were longer than the model can read."""


def encode_tasks(tasks: Iterable[Task], tokenizer: Tokenizer, model: OlmoeConfig) -> list[EncodedTask]:
    """Encode every choice of every question with its context.

    Args:
        tasks: The tasks.
        tokenizer: The model's.
        model: The model's architecture. A context loses its beginning where the model cannot read all of it.

    Raises:
        UserError: A choice is longer than the model can read or has no tokens, or the tokenizer belongs to
            another model.
    """
    return [_encode_task(task, tokenizer, model) for task in tasks]


def _encode_task(task: Task, tokenizer: Tokenizer, model: OlmoeConfig) -> EncodedTask:
    pairs = [
        (one.context_of(number), choice)
        for one in task.questions
        for number, choice in enumerate(one.choices)
    ]
    origins = [one.origin for one in task.questions for _ in one.choices]
    longest, requests, cut = model.max_position_embeddings, [], 0
    encoded = encode_pairs(pairs, tokenizer, first_token(model), joint=task.joint)
    for request, origin in zip(encoded, origins, strict=True):
        if not 0 < request.targets <= longest:
            raise UserError(
                f"{origin}: a choice has {request.targets} tokens, and the model reads 1 to {longest}; leave "
                "the question out"
            )
        if (greatest := int(request.tokens.max())) >= model.vocab_size:
            raise UserError(
                f"{origin}: the tokenizer gives token {greatest}, but the model has only {model.vocab_size} "
                "embeddings: the tokenizer belongs to another model"
            )
        cut += len(request.tokens) > longest + 1
        # The last token is only predicted, so the model reads one token less.
        requests.append(Request(request.tokens[-(longest + 1) :], request.targets))
    return EncodedTask(task, requests, cut)


def first_token(model: OlmoeConfig) -> int:
    """What precedes a continuation whose context is empty: the end-of-text token, as between documents."""
    eos = model.eos_token_id
    if isinstance(eos, list):
        return eos[0]
    return model.pad_token_id or 0 if eos is None else eos


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, first: int, joint: bool
) -> list[Request]:
    """Encode contexts with their continuations.

    Args:
        pairs: (Context, continuation).
        tokenizer: The model's.
        first: Token that precedes a continuation whose context is empty.
        joint: Whether the two are tokenized together and cut where the context ends; spaces at the end of the
            context then belong to the continuation. The context has the tokens that it has alone, as in
            lm-eval. False: each by itself.

    Returns:
        One request per pair. An empty continuation has no targets.
    """
    requests = []
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        some = pairs[start : start + _PAIRS_AT_ONCE]
        if joint:
            some = [_spaces_to_continuation(*pair) for pair in some]
        ids = _encode_once(
            {text for pair in some for text in (pair[0], "".join(pair) if joint else pair[1])}, tokenizer
        )
        for context, continuation in some:
            before, after = ids[context], ids[context + continuation if joint else continuation]
            if joint:
                if continuation and len(after) <= len(before):
                    before = after[:-1]  # a merge across the boundary leaves the continuation one token
                after = after[len(before) :]
            if not len(before):
                before = np.array([first], np.int32)
            requests.append(Request(np.concatenate([before, after]), len(after)))
    return requests


def _encode_once(texts: set[str], tokenizer: Tokenizer) -> dict[str, Tokens]:
    """The tokens of each text, without special tokens around it."""
    ordered = sorted(texts)
    encodings = tokenizer.encode_batch_fast(ordered, add_special_tokens=False)
    return {text: np.asarray(one.ids, np.int32) for text, one in zip(ordered, encodings, strict=True)}


def _spaces_to_continuation(context: str, continuation: str) -> tuple[str, str]:
    """Move the white space at the end of a context to its continuation, where byte-level BPEs have it."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation

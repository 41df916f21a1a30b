"""Continue the prompts of a file (olmoe generate prompts=FILE), with continuous batching."""

import contextlib
import json
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from olmoe_train.cli.chat_session import DEFAULT_NEW_TOKENS as NEW_TOKENS_OF_AN_ANSWER
from olmoe_train.cli.chat_session import end_of_turn_tokens, open_chat_template
from olmoe_train.config.generate import GenerateConfig
from olmoe_train.data.chat_template import ASSISTANT, ChatTemplate, Conversation, TemplateError
from olmoe_train.data.prepare.batches import DAMAGE, chunks, numbered_lines
from olmoe_train.data.prepare.record_forms import FormError, messages_of
from olmoe_train.data.tokenizer import check_vocabulary, load_tokenizer
from olmoe_train.evaluation.tasks.records import check_text, json_object
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.decoding import Completion, Prompt, check_prompts, complete, raise_first
from olmoe_train.model.generation import stop_tokens
from olmoe_train.utils.errors import UserError

WRITTEN = ("completion", "tokens", "finish_reason")
"""Fields that a record gets."""


@dataclass(frozen=True)
class Record:
    """A line of the file of prompts."""

    fields: dict[str, Any]
    messages: list[dict[str, Any]] | None
    """The conversation to answer. None: `fields["prompt"]` is continued as text."""
    where: str
    """path:line"""

    @property
    def beginning(self) -> bytes:
        """How the line of the finished record begins, up to what is added."""
        return json.dumps(self.fields)[:-1].encode()

    def finished(self, completion: Completion, text: str) -> bytes:
        """The line of the finished record."""
        reason = "stop" if completion.is_stopped else "length"
        added = dict(zip(WRITTEN, (text, len(completion.tokens), reason), strict=True))
        return json.dumps(self.fields | added).encode() + b"\n"


def read_records(cfg: GenerateConfig) -> list[Record]:
    """Read the file of prompts. Blank lines do not count.

    Raises:
        UserError: The file cannot be read, or lines are wrong; the message names path:line of each, up to 10.
    """
    assert cfg.prompts is not None
    path = Path(cfg.prompts)
    records: list[Record] = []
    wrong: list[str] = []
    number = 0
    try:
        with path.open("rb") as raw:
            for number, line, _ in numbered_lines(chunks(raw, str(path)), sys.maxsize, 0):
                if line.strip():
                    try:
                        records.append(_record(line, f"{path}:{number}", cfg))
                    except UserError as error:
                        wrong.append(str(error))
    except DAMAGE as error:
        raise UserError(f"prompts={path}: the file is damaged after line {number} ({error})") from error
    except OSError as error:
        raise UserError(f"prompts={path}: cannot be read: {error.strerror}") from error
    raise_first(wrong)
    if not records:
        raise UserError(
            f'prompts={path}: is empty; give it one JSON object per line, such as {{"prompt": "def"}}'
        )
    return records


def _record(line: bytes, where: str, cfg: GenerateConfig) -> Record:
    fields = json_object(line, where)
    given = [key for key in ("prompt", "messages") if key in fields]
    if len(given) != 1:
        count = "both prompt and messages" if given else "neither prompt nor messages"
        raise UserError(f"{where}: has {count}; give a text as prompt, or a conversation as messages")
    for key in WRITTEN:
        if key in fields:
            raise UserError(f"{where}: has a field {key!r}, which the result of the record gets; rename it")
    limit = fields.get("max_new_tokens", 1)
    if type(limit) is not int or limit < 1:  # true is an int to isinstance
        raise UserError(f"{where}: max_new_tokens is {json.dumps(limit)}; give a number of at least 1")
    if given == ["messages"]:
        return Record(fields, _messages(fields["messages"], where, cfg), where)
    check_text(fields["prompt"], "prompt", where)
    if not fields["prompt"].strip():
        raise UserError(f"{where}: prompt is empty; give some text to continue")
    asked = [*_system(cfg), {"role": "user", "content": fields["prompt"]}] if cfg.chat else None
    return Record(fields, asked, where)


def _messages(value: Any, where: str, cfg: GenerateConfig) -> list[dict[str, Any]]:
    try:
        messages = messages_of(value, "messages")
    except FormError as error:
        raise UserError(f"{where}: {error}") from None
    if messages[-1]["role"] == ASSISTANT:
        raise UserError(f"{where}: the last message is the assistant's, which is to be written; leave it out")
    return messages if messages[0]["role"] == "system" else [*_system(cfg), *messages]


def _system(cfg: GenerateConfig) -> list[dict[str, Any]]:
    return [] if cfg.system is None else [{"role": "system", "content": cfg.system}]


class Encoder:
    """Turns records into prompts of a model, and completions into texts."""

    def __init__(
        self, model: OlmoeForCausalLM, directory: Path, cfg: GenerateConfig, new_tokens: int
    ) -> None:
        """
        Args:
            model: Its vocabulary and its end-of-text tokens are used.
            directory: Its tokenizer files.
            cfg: The options.
            new_tokens: Greatest number of tokens to add to a text.
        """
        self._directory, self._cfg = directory, cfg
        self._vocabulary = model.config.vocab_size
        self._tokenizer: Tokenizer = load_tokenizer(directory)
        self._stops = frozenset(stop_tokens(model))
        self._new_tokens = new_tokens

    @cached_property
    def _template(self) -> ChatTemplate:
        return open_chat_template(self._directory, self._cfg)

    @cached_property
    def _ends_of_turn(self) -> frozenset[int]:
        return self._stops | end_of_turn_tokens(self._template, self._tokenizer)

    def prompts(self, records: list[Record]) -> list[Prompt]:
        """Encode all records.

        Raises:
            UserError: Some cannot be encoded; the message names path:line of each, up to 10.
        """
        found, wrong = [], []
        for index, record in enumerate(records):
            try:
                found.append(self._prompt(record, f"{self._cfg.seed} {index}"))
            except TemplateError as error:
                wrong.append(f"{record.where}: {error}")
        raise_first(wrong)
        return found

    def _prompt(self, record: Record, seed: str) -> Prompt:
        if record.messages is None:
            ids = self._tokenizer.encode(record.fields["prompt"]).ids
            limit, stops = self._new_tokens, self._stops
        else:
            conversation = self._template.with_text_content(Conversation(record.messages))
            text = self._template.render(conversation.messages, add_generation_prompt=True)
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            limit, stops = NEW_TOKENS_OF_AN_ANSWER, self._ends_of_turn
        if ids:
            check_vocabulary(ids, self._vocabulary, self._directory)
        limit = limit if self._cfg.max_new_tokens is None else self._cfg.max_new_tokens
        limit = record.fields.get("max_new_tokens", limit)
        return Prompt(array("I", ids), limit, stops, seed, record.where)

    def text(self, completion: Completion) -> str:
        """The text of a completion, without the token that ended it."""
        tokens = completion.tokens[:-1] if completion.is_stopped else completion.tokens
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


@contextlib.contextmanager
def open_output(out: str | None, records: list[Record]) -> Iterator[tuple[BinaryIO, int]]:
    """Open what the finished records are written to.

    A file that holds the first of them is continued; what was left of a line that was being written is cut
    off.

    Args:
        out: The file. None: stdout.
        records: All records.

    Yields:
        The stream, and how many records it has already.

    Raises:
        UserError: The file cannot be written, or holds something else.
    """
    if out is None:
        yield sys.stdout.buffer, 0
        return
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise UserError(f"out={path}: cannot be written: {error.strerror}") from error
    with file:
        file.seek(0)
        *lines, rest = file.read().split(b"\n")
        for number, line in enumerate([*lines, rest] if rest else lines, start=1):
            is_whole = number <= len(lines)
            expected = records[number - 1].beginning if number <= len(records) else None
            if expected is None or not _begins(line, expected, is_whole):
                raise UserError(
                    f"{path}:{number}: is not the result of record {number} of the prompts; give another "
                    "out=FILE, or remove this one"
                )
        file.truncate(sum(len(line) + 1 for line in lines))
        yield file, len(lines)


def _begins(line: bytes, expected: bytes, is_whole: bool) -> bool:
    """Whether a line is that of a finished record, or if it is not whole, may become it."""
    added = expected + b', "completion": '
    return line.startswith(added) or (not is_whole and added.startswith(line))


def continue_all(
    model: OlmoeForCausalLM,
    device: torch.device,
    encoder: Encoder,
    records: list[Record],
    output: tuple[BinaryIO, int],
    cfg: GenerateConfig,
) -> None:
    """Write the finished records, in the order of the file.

    Args:
        model: The model.
        device: Where it is.
        encoder: Encodes its prompts.
        records: All records.
        output: The stream to write to, and how many records it has already.
        cfg: The options.
    """
    stream, done = output
    prompts = encoder.prompts(records)
    check_prompts(prompts, cfg.batch_size, cfg.max_batch_tokens)
    completions = complete(
        model,
        prompts[done:],
        device,
        cfg.batch_size,
        cfg.max_batch_tokens,
        cfg.temperature,
        cfg.top_k,
        cfg.top_p,
    )
    early: dict[int, Completion] = {}
    written, tokens, began = done, 0, time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("prompts", total=len(records), completed=done)
        for completion in completions:
            early[done + completion.index] = completion
            tokens += len(completion.tokens)
            progress.advance(bar)
            while (next_one := early.pop(written, None)) is not None:
                stream.write(records[written].finished(next_one, encoder.text(next_one)))
                written += 1
            stream.flush()
    seconds = time.perf_counter() - began
    before = f" after {done:,} that were there" if done else ""
    where = "" if cfg.out is None else f": {cfg.out}"
    print(
        f"{written - done:,} prompts continued{before}, {tokens:,} tokens in {seconds:.1f} s "
        f"({tokens / max(seconds, 1e-9):,.0f} tokens/s){where}",
        file=sys.stderr,
    )

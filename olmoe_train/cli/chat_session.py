"""A conversation with a model: its messages, and the keys and values of their tokens."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from olmoe_train.config.generate import GenerateConfig
from olmoe_train.data.chat_template import ASSISTANT, ChatTemplate, Message, TemplateError, open_template
from olmoe_train.data.tokenizer import check_vocabulary, load_tokenizer, read_tokenizer_files
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.generation import stop_tokens, stream_tokens
from olmoe_train.model.kv_cache import KVCache
from olmoe_train.utils.errors import UserError

DEFAULT_NEW_TOKENS = 1024
"""max_new_tokens if the key is null and chat is true."""
# Stands for an answer while it is tried out how the template ends one. No template has it.
_PROBE = "Zq7probe"


class Ending(Enum):
    """Why an answer has ended."""

    turn = "the model has ended it"
    max_new_tokens = "it has as many tokens as max_new_tokens allows"
    positions = "the conversation has as many tokens as the model has positions for"


@dataclass
class ChatSession:
    """A model with the conversation that it has had so far."""

    model: OlmoeForCausalLM
    device: torch.device
    directory: Path
    """Directory of the tokenizer files, for messages."""
    tokenizer: Tokenizer
    template: ChatTemplate
    stops: list[int]
    """Tokens that end an answer."""
    cfg: GenerateConfig
    generator: torch.Generator
    messages: list[Message]
    _cache: KVCache = field(default_factory=KVCache)
    _cached: list[int] = field(default_factory=list)
    """The tokens whose keys and values are in the cache."""

    def clear(self) -> None:
        """Forget all messages but the system message."""
        self.messages = _system_messages(self.cfg)

    def answer(self, text: str, write: Callable[[str], None]) -> Ending:
        """Add a message of the user and the model's answer to the conversation.

        Args:
            text: The message.
            write: Called with each piece of the answer, of whole characters, as soon as it is decided.

        Returns:
            Why the answer has ended.

        Raises:
            UserError: The template refuses the message, the conversation is longer than the model has
                positions for, or a logit is not finite. The message and what was written of the answer are
                not part of the conversation then.
            KeyboardInterrupt: Raised by Ctrl-C. What was written of the answer stays in the conversation; if
                nothing was written, neither does the message.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(asked)
        # The last token that is decided needs no position: it is not fed to the model.
        room = self.model.config.max_position_embeddings - len(ids) + 1
        if room < 1:
            raise UserError(
                f"the conversation with this message has {len(ids)} tokens, but the model has "
                f"max_position_embeddings={self.model.config.max_position_embeddings}: the message was not "
                "added.\n  Shorten it, or begin a new conversation (in a terminal: /clear)."
            )
        pieces: list[str] = []

        def write_and_keep(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        try:
            ending = self._decode(ids, room, write_and_keep)
        except (KeyboardInterrupt, UserError) as error:
            # The layers may hold different numbers of positions, so the cache is of no use any more.
            self._cache, self._cached = KVCache(), []
            if pieces and isinstance(error, KeyboardInterrupt):
                self.messages = [*asked, {"role": ASSISTANT, "content": "".join(pieces)}]
            raise
        self.messages = [*asked, {"role": ASSISTANT, "content": "".join(pieces)}]
        return ending

    def _encode(self, messages: list[Message]) -> list[int]:
        try:
            text = self.template.render(messages, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"{self.directory}: {error}") from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise UserError(f"{self.directory}: the chat template renders the message as an empty text")
        check_vocabulary(ids, self.model.config.vocab_size, self.directory)
        return ids

    def _decode(self, ids: list[int], room: int, write: Callable[[str], None]) -> Ending:
        """Answer a prompt, computing only tokens after those that it shares with what is in the cache."""
        cfg = self.cfg
        limit = DEFAULT_NEW_TOKENS if cfg.max_new_tokens is None else cfg.max_new_tokens
        shared = _common_prefix(self._cached, ids[:-1])  # the last one's logits are needed
        self._cache.crop(shared)
        ids_BS = torch.tensor([ids], device=self.device)
        tokens = stream_tokens(
            self.model,
            ids_BS,
            min(limit, room),
            torch.ones_like(ids_BS),  # a padding token in a message is no padding
            cfg.temperature,
            cfg.top_k,
            cfg.top_p,
            self.stops,
            generator=self.generator,
            cache=self._cache,
        )
        decoder = DecodeStream(skip_special_tokens=True)
        ending = Ending.max_new_tokens if limit < room else Ending.positions
        known = list(ids)
        for token_B in tokens:
            token = int(token_B)
            known.append(token)
            if token in self.stops:
                ending = Ending.turn
            elif piece := decoder.step(self.tokenizer, token):
                write(piece)  # None while the bytes so far end in the middle of a character
        self._cached = known[: self._cache.get_seq_length()]
        return ending


def open_session(
    model: OlmoeForCausalLM, device: torch.device, directory: Path, cfg: GenerateConfig
) -> ChatSession:
    """Prepare a conversation with a model.

    Args:
        model: The model.
        device: Where its parameters are.
        directory: Its tokenizer files and its chat template.
        cfg: The options of `olmoe generate`.

    Raises:
        UserError: There is no tokenizer or chat template, or the template refuses the system message.
    """
    tokenizer = load_tokenizer(directory)
    template = open_chat_template(directory, cfg)
    system = _system_messages(cfg)
    if system:
        try:
            template.render([*system, {"role": "user", "content": "?"}], add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"system={cfg.system}: {error} ({directory})") from None
    stops = sorted({*stop_tokens(model), *end_of_turn_tokens(template, tokenizer)})
    generator = torch.Generator(device).manual_seed(cfg.seed)
    return ChatSession(model, device, directory, tokenizer, template, stops, cfg, generator, system)


def open_chat_template(directory: Path, cfg: GenerateConfig) -> ChatTemplate:
    """Open the chat template of a model's directory, with the variables of the configuration.

    Raises:
        UserError: There is none, or it does not read one of the variables.
    """
    files = read_tokenizer_files(directory, origin=str(directory))
    if files.chat_template is None:
        raise UserError(
            f"{directory}: no chat template, which a conversation needs (chat_template.jinja, or "
            "chat_template in tokenizer_config.json).\n  Copy the chat_template.jinja of the model there, or "
            "continue a text: a prompt without chat=true."
        )
    return open_template(
        files.chat_template,
        files.special_tokens,
        datetime.date.today().isoformat(),
        f"the chat template of {directory}",
        kwargs=cfg.chat_template_kwargs,
        kwargs_key="chat_template_kwargs",
    )


def end_of_turn_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> set[int]:
    """The tokens with which a template ends an answer.

    It is tried out what the template renders after an answer, as the last message and before another one:
    the first added token of the tokenizer there, such as <|im_end|>. A template that ends answers with plain
    text has none.
    """
    added = {
        number for number, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip()
    }
    question = {"role": "user", "content": "?"}
    talk = [question, {"role": ASSISTANT, "content": _PROBE}]
    found: set[int] = set()
    for messages in (talk, [*talk, question]):
        try:
            text = template.render(messages)
        except TemplateError:
            continue
        after = tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False).ids
        found |= set([token for token in after if token in added][:1])
    return found


def _system_messages(cfg: GenerateConfig) -> list[Message]:
    return [] if cfg.system is None else [{"role": "system", "content": cfg.system}]


def _common_prefix(first: list[int], second: list[int]) -> int:
    """The number of tokens at the start that both have."""
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)

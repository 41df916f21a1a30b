"""Continue a prompt with a Hugging Face directory or a run's newest checkpoint, or talk to it (chat=true).
Text is printed as it is generated. prompts=FILE continues the prompts of a file.
"""

import logging
import re
import sys
from dataclasses import fields
from pathlib import Path

import torch
from hydra.core.override_parser.types import Quote, QuotedString
from tokenizers.decoders import DecodeStream

from olmoe_train.checkpoint.convert.stored_model import load_stored_model
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.chat import converse
from olmoe_train.cli.chat_session import open_session
from olmoe_train.cli.generate_prompts import Encoder, continue_all, open_output, read_records
from olmoe_train.config.choices import StripPrefix
from olmoe_train.config.generate import GenerateConfig
from olmoe_train.data.tokenizer import check_vocabulary, load_tokenizer
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.generation import refuse_expert_choice, stream_tokens, warn_of_length
from olmoe_train.utils.errors import UserError

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 64
"""max_new_tokens if the key is null and chat is false."""


def main(cfg: GenerateConfig) -> None:
    """Print the prompt and, token by token, its continuation; or continue a file; or hold a conversation."""
    _warn_of_unused_keys(cfg)
    if cfg.prompts is not None:
        _continue_file(cfg)
        return
    if cfg.prompt is None and not cfg.chat:
        raise UserError(
            "prompt is missing: give text to continue (prompt=TEXT), or a file of prompts (prompts=FILE), or "
            "talk (chat=true)"
        )
    if cfg.prompt is not None and not cfg.prompt.strip():
        raise UserError("prompt is empty: give some text to continue")
    model, device, directory = _load(cfg)
    if cfg.chat:
        converse(open_session(model, device, directory, cfg), cfg.prompt)
    else:
        _continue(model, device, directory, cfg)


def _load(cfg: GenerateConfig) -> tuple[OlmoeForCausalLM, torch.device, Path]:
    """The model, where it is, and the directory of its tokenizer files."""
    device = resolve_device()
    model, directory = load_stored_model(
        cfg.source, device, cfg.trust_pickle, cfg.strip_prefix is StripPrefix.auto, cfg.which
    )
    refuse_expert_choice(model.config)
    return model, device, directory


def _continue_file(cfg: GenerateConfig) -> None:
    if cfg.prompt is not None:
        raise UserError("prompt and prompts are both given: continue one text or a file of them")
    records = read_records(cfg)
    with open_output(cfg.out, records) as output:
        model, device, directory = _load(cfg)
        encoder = Encoder(model, directory, cfg, DEFAULT_NEW_TOKENS)
        continue_all(model, device, encoder, records, output, cfg)


def _continue(model: OlmoeForCausalLM, device: torch.device, directory: Path, cfg: GenerateConfig) -> None:
    assert cfg.prompt is not None
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(cfg.prompt).ids
    if not ids:
        raise UserError("prompt is empty: give some text to continue")
    check_vocabulary(ids, model.config.vocab_size, directory)
    tokens = stream_tokens(
        model,
        torch.tensor([ids], device=device),
        DEFAULT_NEW_TOKENS if cfg.max_new_tokens is None else cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        generator=torch.Generator(device).manual_seed(cfg.seed),
    )
    print(cfg.prompt, end="", flush=True)
    decoder = DecodeStream(skip_special_tokens=True)
    length = len(ids)
    for token_B in tokens:
        length += 1
        # `step` returns None while the bytes so far end in the middle of a character.
        print(decoder.step(tokenizer, int(token_B)) or "", end="", flush=True)
    print(flush=True)
    warn_of_length(model.config, length)  # after the text, which it would interrupt


def _warn_of_unused_keys(cfg: GenerateConfig) -> None:
    """Warn of keys that are set and have no effect."""
    sampling = ("top_k", "top_p", "seed") if cfg.temperature == 0 else ()
    talking = () if cfg.chat or cfg.prompts is not None else ("system", "chat_template_kwargs")
    from_file = ("out", "batch_size", "max_batch_tokens") if cfg.prompts is None else ()
    defaults = {one.name: one.default for one in fields(cfg)} | {"chat_template_kwargs": {}}
    for names, reason in (
        (sampling, "temperature=0 does not sample"),
        (talking, "chat=false"),
        (from_file, "there is no file of prompts (prompts=FILE)"),
    ):
        for name in names:
            if getattr(cfg, name) != defaults[name]:
                log.warning("warning: %s=%s has no effect: %s", name, getattr(cfg, name), reason)


def quoted(argument: str) -> str:
    r"""Quote the value of a `prompt=...` or `system=...` argument for Hydra, so that it may be any text.

    Hydra parses every argument with its own grammar, in which parentheses, commas, quotes and braces have a
    meaning, and OmegaConf replaces `${...}` by the value of a key. Without quotes, `prompt=def main(` is a
    syntax error, and `prompt=${HOME}` a missing key. The value is put in single quotes, with `\${` for `${`.

    Args:
        argument: One argument of the command line.

    Returns:
        The quoted argument; an argument with another key is returned unchanged.
    """
    key, equals, text = argument.partition("=")
    if key not in ("prompt", "system") or not equals:
        return argument
    # Backslashes directly before "${" are doubled, because OmegaConf reads them as escapes there.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def run() -> int:
    """Run `olmoe generate` with the command line; returns the exit code."""
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    return run_verb("generate", GenerateConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())

"""Continue a prompt with a Hugging Face directory or a run's newest checkpoint. Text is printed as it is
generated.
"""

import re
import sys

import torch
from hydra.core.override_parser.types import Quote, QuotedString
from tokenizers.decoders import DecodeStream

from olmoe_train.checkpoint.convert.stored_model import load_stored_model
from olmoe_train.cli.app import run_verb
from olmoe_train.config.choices import StripPrefix
from olmoe_train.config.verbs import GenerateConfig
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.model.generation import stream_tokens
from olmoe_train.utils.errors import UserError


def main(cfg: GenerateConfig) -> None:
    """Print the prompt and, token by token, its continuation."""
    device = resolve_device()
    model, directory = load_stored_model(
        cfg.source, device, cfg.trust_pickle, cfg.strip_prefix is StripPrefix.auto
    )
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(cfg.prompt).ids
    if not ids:
        raise UserError("prompt is empty: give some text to continue")
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"{directory}/tokenizer.json gives token {max(ids)}, but the model has only "
            f"{model.config.vocab_size} tokens: the tokenizer belongs to another model"
        )
    tokens = stream_tokens(
        model,
        torch.tensor([ids], device=device),
        cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        generator=torch.Generator(device).manual_seed(cfg.seed),
    )
    print(cfg.prompt, end="", flush=True)
    decoder = DecodeStream(skip_special_tokens=True)
    for token_B in tokens:
        # `step` returns None while the bytes so far end in the middle of a character.
        print(decoder.step(tokenizer, int(token_B)) or "", end="", flush=True)
    print()


def quoted(argument: str) -> str:
    r"""Quote the value of a `prompt=...` argument for Hydra, so that the prompt may be any text.

    Hydra parses every argument with its own grammar, in which parentheses, commas, quotes and braces have a
    meaning, and OmegaConf replaces `${...}` by the value of a key. Without quotes, `prompt=def main(` is a
    syntax error, and `prompt=${HOME}` a missing key. The value is put in single quotes, with `\${` for `${`.

    Args:
        argument: One argument of the command line.

    Returns:
        The quoted argument; an argument that does not start with `prompt=` is returned unchanged.
    """
    key, equals, text = argument.partition("=")
    if key != "prompt" or not equals:
        return argument
    # Backslashes directly before "${" are doubled, because OmegaConf reads them as escapes there.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return f"prompt={QuotedString(text, Quote.single).with_quotes()}"


def run() -> int:
    """Run `olmoe generate` with the command line; returns the exit code."""
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    return run_verb("generate", GenerateConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())

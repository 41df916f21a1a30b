"""Continue a prompt with a Hugging Face directory or a run's newest checkpoint; the text is streamed."""

import re
import sys

import torch
from hydra.core.override_parser.types import Quote, QuotedString
from tokenizers.decoders import DecodeStream

from olmoe_train.checkpoint.convert.source import load_source
from olmoe_train.cli.app import run_verb
from olmoe_train.config.verbs import GenerateConfig
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.model.generation import stream_tokens
from olmoe_train.utils.errors import UserError


def main(cfg: GenerateConfig) -> None:
    device = resolve_device()
    model, directory = load_source(cfg.source, device, cfg.trust_pickle)
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(cfg.prompt).ids
    if not ids:
        raise UserError("prompt is empty: give some text to continue")
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"{directory}/tokenizer.json knows token {max(ids)}, the model {model.config.vocab_size} tokens: "
            "they do not belong together"
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
        # None while the bytes so far end inside a character.
        print(decoder.step(tokenizer, int(token_B)) or "", end="", flush=True)
    print()


def quoted(argument: str) -> str:
    """A `prompt=...` argument in Hydra's quoting, so that any text is taken as it is typed; others unchanged.

    Unquoted, Hydra's grammar would stop at the parenthesis of `prompt=def main(`, and read `${...}` as a
    reference.
    """
    key, equals, text = argument.partition("=")
    if key != "prompt" or not equals:
        return argument
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return f"prompt={QuotedString(text, Quote.single).with_quotes()}"


def run() -> int:
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    return run_verb("generate", GenerateConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())

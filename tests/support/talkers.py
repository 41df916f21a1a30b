"""HF directories of tiny models to talk to. Their weights are made so that it is known what they say."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.chat_templates import EOS, IM_END, TEMPLATES, write_tokenizer
from tests.support.sizes import SIZES

VOCABULARY = 400


def write_reciter(directory: Path, template: str, answer: str, **config: Any) -> Path:
    """Write a model that gives one answer, whatever it is told, and ends it with <|im_end|>.

    Each token is followed by the next one of the answer, which must have no token twice. The prompt must end
    with a line break.
    """
    tokenizer = Tokenizer.from_file(str(write_tokenizer(directory, template) / "tokenizer.json"))
    ids = [*tokenizer.encode("\n" + answer).ids, IM_END]
    assert len(set(ids)) == len(ids)
    sizes = {"hidden_size": VOCABULARY, "intermediate_size": 4, "num_hidden_layers": 1, "num_experts": 2}
    model = _model(**sizes, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.get_parameter("weight").fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.lm_head.weight[ids[1:], ids[:-1]] = 1
    model.save_pretrained(directory)
    return directory


def write_babbler(directory: Path, template: str = TEMPLATES["chatml"], **config: Any) -> Path:
    """Write a model with random weights that never ends an answer. It says ASCII characters only."""
    tokenizer = Tokenizer.from_file(str(write_tokenizer(directory, template) / "tokenizer.json"))
    torch.manual_seed(0)
    model = _model(**config)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
        for token in range(VOCABULARY):
            text = tokenizer.decode([token])  # empty for special tokens
            if not (text.isascii() and text.isprintable() and text):
                model.lm_head.weight[token] = 0  # some other token has a logit above 0
    model.save_pretrained(directory)
    return directory


def _model(**config: Any) -> OlmoeForCausalLM:
    tokens = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": 2}
    return OlmoeForCausalLM(OlmoeConfig(**SIZES | tokens | config))

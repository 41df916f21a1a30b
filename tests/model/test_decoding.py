"""Continuous batching: the tokens of a prompt that is decoded alone, whatever else is in the batch."""

import random
from typing import Any

import pytest
import torch

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.decoding import Prompt, complete
from olmoe_train.utils.errors import UserError
from tests.support.pair import ROPES, TINY, make_pair
from tests.support.sizes import SIZES

CPU = torch.device("cpu")
STOPS = [2, 3, 4, 5, 6, 7, 8, 9, 10]
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped_query": {**TINY, "num_key_value_heads": 2, "eos_token_id": STOPS},
    "rope_dynamic": {**TINY, "eos_token_id": STOPS, "rope_parameters": ROPES[2]},  # decoded one by one
    "rope_yarn": {**TINY, "eos_token_id": STOPS, "rope_parameters": ROPES[3]},
}
LENGTHS = [3, 17, 1, 8, 30, 2, 11, 5, 1, 20]


def uneven_prompts(seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, TINY["vocab_size"]) for _ in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_are_those_of_each_prompt_alone(name: str) -> None:
    ours, theirs = make_pair(CONFIGS[name], seed=1)
    prompts = uneven_prompts()
    got = ours.generate_batch(prompts, max_new_tokens=40, batch_size=4, max_batch_tokens=220)
    for prompt, tokens in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        assert ours.generate(ids, max_new_tokens=40)[0].tolist() == prompt + tokens
        expected = theirs.generate(  # type: ignore[misc]  # its stub does not accept its own class
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
        assert expected[0].tolist() == prompt + tokens
    lengths = {len(tokens) for tokens in got}
    assert len(lengths) > 3, "all end alike: no row is refilled while others go on"


def test_a_batch_is_full_and_its_cache_within_the_limit() -> None:
    """Prompts of 2, 2, 2 and 10 tokens with 3 more each need 4, 4, 4 and 12 positions."""
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES)).eval()
    passes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    prompts = [Prompt(list(range(3, 3 + length)), 3) for length in (2, 2, 2, 10)]
    done = [one.index for one in complete(model, prompts, CPU, batch_size=2, max_batch_tokens=14)]
    # Two prompts of 2 tokens, two steps; the third one; not the last one, because 2 x 12 > 14.
    assert passes == [(1, 4), (2, 1), (2, 1), (1, 2), (1, 1), (1, 1), (1, 10), (1, 1), (1, 1)]
    assert sorted(done) == [0, 1, 2, 3]
    passes.clear()
    assert len(list(complete(model, prompts, CPU, batch_size=3, max_batch_tokens=36))) == 4
    assert passes == [(1, 6), (3, 1), (3, 1), (1, 10), (1, 1), (1, 1)]


def test_a_row_that_ends_makes_place_at_once() -> None:
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES)).eval()
    passes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    prompts = [Prompt([5], 4), Prompt([6, 7], 2), Prompt([8, 9, 10], 1), Prompt([11, 12, 13, 14], 2)]
    done = [one.index for one in complete(model, prompts, CPU, batch_size=2)]
    # Prompt 1 ends after its step, 2 in its prefill, and 3 goes on with 0, which has two steps to go.
    assert passes == [(1, 3), (2, 1), (1, 3), (1, 4), (2, 1), (1, 1)]
    assert done == [1, 2, 3, 0]


def test_what_a_prompt_draws_does_not_depend_on_the_batch() -> None:
    ours, _ = make_pair({**TINY, "eos_token_id": STOPS}, seed=1)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    prompts = [[7, 20, 31]] * 3 + uneven_prompts()
    alone = ours.generate_batch(prompts, batch_size=1, **options)
    assert ours.generate_batch(prompts, batch_size=5, **options) == alone
    assert ours.generate_batch(prompts, batch_size=5, seed=1, **options) != alone
    assert alone[0] != alone[1], "equal prompts draw other numbers"


def test_what_cannot_be_decoded_is_named() -> None:
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES)).eval()
    with pytest.raises(
        UserError, match=r"prompts\[1\]: the prompt is empty.*\n  prompts\[2\]: 9 tokens and max_"
    ):
        model.generate_batch([[3], [], [3] * 9], max_new_tokens=4, max_batch_tokens=10)
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        model.generate_batch([[3]], batch_size=0)
    with pytest.raises(UserError, match="top_p=0"):
        model.generate_batch([[3]], temperature=1.0, top_p=0)
    with torch.no_grad():
        model.model.embed_tokens.weight[4] = torch.inf
    with pytest.raises(
        UserError, match=r"^logits\[0, 0\] is nan .row, token. of the rows prompts\[0\]: the weights"
    ):
        model.generate_batch([[5, 4]])

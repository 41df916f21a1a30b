"""Greedy decoding, token for token, against Transformers' generate on the same weights."""

import warnings
from typing import Any

import pytest
import torch

from tests.support.pair import ROPES, TINY, make_batch, make_pair, random_config

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": TINY,
    "grouped_query": {**TINY, "num_key_value_heads": 2},
    "no_pad_token": {**TINY, "pad_token_id": None},
    "several_eos": {**TINY, "eos_token_id": [2, 3, 4, 5, 6, 7, 8, 9, 10]},
    **{f"rope_{rope['rope_type']}": {**TINY, "rope_parameters": rope} for rope in ROPES[1:]},
    **{f"random_{seed}": random_config(seed) for seed in (0, 2, 4)},
}
NEW = 30


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy(name: str, padding: str) -> None:
    ours, theirs = make_pair(CONFIGS[name], seed=1)
    batch = make_batch(4, padding)
    del batch["labels"]
    expected = theirs.generate(**batch, max_new_tokens=NEW, do_sample=False)
    got = ours.generate(**batch, max_new_tokens=NEW)
    assert got.tolist() == expected.tolist()
    assert got.shape[1] > batch["input_ids"].shape[1] + 3, "too short to show anything"
    assert got[:, batch["input_ids"].shape[1] :].unique().numel() > 3, "stuck on few tokens: shows little"


def test_pad_tokens_in_the_prompt_are_taken_for_padding() -> None:
    ours, theirs = make_pair(TINY, seed=1)
    ids = torch.tensor([[1, 1, 5, 7, 9], [4, 6, 1, 8, 10], [11, 12, 13, 14, 15]])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    assert ours.generate(ids, max_new_tokens=12).tolist() == expected.tolist()
    # Unless padding is also an eos, when it cannot be told from text.
    for model in (ours, theirs):
        model.config.eos_token_id = 1
    theirs.generation_config.eos_token_id = 1
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    assert ours.generate(ids, max_new_tokens=12).tolist() == expected.tolist()


def test_outputs_that_the_config_asks_for_do_not_get_in_the_way() -> None:
    ours, theirs = make_pair(TINY, seed=1)
    ours.config.output_router_logits = ours.config.output_hidden_states = True
    ours.config.return_dict = False
    batch = make_batch(4, "left")
    del batch["labels"]
    expected = theirs.generate(**batch, max_new_tokens=5, do_sample=False)
    assert ours.generate(**batch, max_new_tokens=5).tolist() == expected.tolist()


def test_max_length_and_the_default_length() -> None:
    ours, theirs = make_pair({**TINY, "eos_token_id": None}, seed=1)
    ids = torch.tensor([[5, 7, 9]])
    for options in [{"max_length": 9}, {}]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Transformers dislikes its own default length
            expected = theirs.generate(ids, do_sample=False, **options)
        assert ours.generate(ids, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5}, {}], ids=str)
def test_sampling_draws_the_same_tokens_from_the_same_seed(options: dict[str, Any]) -> None:
    """The same kept tokens and probabilities, so the same draws: torch.multinomial consumes the seed
    alike."""
    ours, theirs = make_pair(TINY, seed=1)
    ids = make_batch(4, "none")["input_ids"]
    sampling = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.8}
    torch.manual_seed(0)
    expected = theirs.generate(ids, **sampling, **{"top_k": 0, **options})
    torch.manual_seed(0)
    got = ours.generate(ids, **sampling, **options)
    assert got.tolist() == expected.tolist()

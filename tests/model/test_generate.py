"""Choosing tokens from logits worked by hand, ending rows, padding, and the prompt on the command line."""

from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.cli.generate import quoted
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.generation import generate, sample_token, stream_tokens
from olmoe_train.model.kv_cache import KVCache
from olmoe_train.utils.errors import UserError
from tests.support.sizes import SIZES

# Softmax 0.5, 0.25, 0.15, 0.1, in another order.
LOGITS = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()


def draw(count: int = 4000, **options: Any) -> list[float]:
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    tokens = sample_token(LOGITS.expand(count, 4), generator=generator, **options)
    assert tokens.shape == (count,)
    return (torch.bincount(tokens, minlength=4) / count).tolist()


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(temperature=0.0) == [0, 1, 0, 0]


def test_sampling_follows_the_softmax_at_its_temperature() -> None:
    # Three standard deviations of a frequency over 4000 draws are below 0.024.
    assert draw(temperature=1.0) == pytest.approx([0.15, 0.5, 0.1, 0.25], abs=0.024)
    # Temperature 1/2 squares the probabilities: 0.0225, 0.25, 0.01, 0.0625 over 0.345.
    assert draw(temperature=0.5) == pytest.approx([0.0652, 0.7246, 0.0290, 0.1812], abs=0.024)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert draw(temperature=1.0, top_k=1) == [0, 1, 0, 0]
    assert draw(temperature=1.0, top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.024)
    assert draw(temperature=1.0, top_k=99) == pytest.approx([0.15, 0.5, 0.1, 0.25], abs=0.024)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.49, 1), (0.6, 2), (0.74, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    frequencies = draw(temperature=1.0, top_p=top_p)
    assert [index for index, f in enumerate(frequencies) if f > 0] == sorted([1, 3, 0, 2][:kept])


def test_top_p_counts_what_top_k_left() -> None:
    # Of 0.5 and 0.25 alone the first is 2/3 of the mass, so 0.6 is reached at once.
    assert draw(temperature=1.0, top_k=2, top_p=0.6) == [0, 1, 0, 0]


def test_the_generator_decides() -> None:
    def sample(seed: int) -> Tensor:
        return sample_token(LOGITS.expand(50, 4), 1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


class Counter(OlmoeForCausalLM):
    """Every token is followed by the next number, whatever came before: easy to foresee."""

    def __init__(self) -> None:
        super().__init__(
            OlmoeConfig(
                vocab_size=20,
                hidden_size=40,
                intermediate_size=4,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_experts=2,
                num_experts_per_tok=1,
                pad_token_id=1,
                eos_token_id=9,
            )
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.model.norm.get_parameter("weight").fill_(1)
            self.model.embed_tokens.weight[:, :20] = torch.eye(20)
            self.lm_head.weight[:, :20] = torch.eye(20).roll(1, 0)


def test_rows_end_with_eos_and_are_filled_with_padding() -> None:
    ids = torch.tensor([[5, 6], [2, 3], [7, 8]])
    assert generate(Counter(), ids, max_new_tokens=7).tolist() == [
        [5, 6, 7, 8, 9, 1, 1, 1],
        [2, 3, 4, 5, 6, 7, 8, 9],
        [7, 8, 9, 1, 1, 1, 1, 1],
    ]


def test_generation_stops_when_every_row_has_ended() -> None:
    assert generate(Counter(), torch.tensor([[5], [7]]), max_new_tokens=50).shape == (2, 5)


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(None, [7, 8, 9]), (8, [7, 8]), ([11, 12], [7, 8, 9, 10, 11]), ([], [7, 8, 9, 10, 11, 12, 13, 14])],
)
def test_stop_tokens(eos: Any, expected: list[int]) -> None:
    assert generate(Counter(), torch.tensor([[6]]), 8, eos_token_id=eos)[0, 1:].tolist() == expected


def test_length_is_in_new_tokens_or_in_all() -> None:
    ids = torch.tensor([[2, 3]])
    assert generate(Counter(), ids, max_length=5).tolist() == [[2, 3, 4, 5, 6]]
    assert generate(Counter(), ids, max_new_tokens=3).tolist() == [[2, 3, 4, 5, 6]]
    assert generate(Counter(), ids, eos_token_id=[]).shape == (1, 2 + 20)


def test_tokens_come_as_they_are_decided() -> None:
    stream = stream_tokens(Counter(), torch.tensor([[2], [7]]), 4)
    assert next(stream).tolist() == [3, 8]
    assert [token.tolist() for token in stream] == [[4, 9], [5, 1], [6, 1]]


@pytest.mark.parametrize(
    ("prompts", "new", "warned"),
    [
        ([[2]], 4, False),  # 2 3 4 5: the last one that is fed is at position 3
        ([[2]], 5, True),  # after four new tokens, five are fed
        ([[2, 3, 4, 5, 6]], 1, True),  # the prompt alone is longer
        ([[2, 3, 4, 5]], 1, False),
        ([[2, 3, 4, 5]], 2, True),
        ([[1, 1, 2, 3], [1, 1, 1, 4]], 3, False),  # padding takes no position
        ([[1, 1, 2, 3], [1, 1, 1, 4]], 4, True),
    ],
)
def test_one_warning_after_a_text_that_is_longer_than_the_model(
    prompts: list[list[int]], new: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counter()
    model.config.max_position_embeddings = 4
    generate(model, torch.tensor(prompts), new, eos_token_id=[])
    assert len(caplog.messages) == int(warned)
    if warned:
        assert "longer than the model's max_position_embeddings=4" in caplog.text


def test_tokens_that_are_in_the_cache_are_not_computed_again() -> None:
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
    ids = torch.randint(2, 97, (2, 12))
    ids[0, :2] = SIZES["pad_token_id"]
    expected = generate(model, ids, 10, eos_token_id=[])[:, 12:]
    cache = KVCache()
    for _ in stream_tokens(model, ids[:, :5], 4, eos_token_id=[], cache=cache):
        pass
    assert cache.get_seq_length() == 5 + 3
    cache.crop(5)
    fed: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1]))
    tokens = list(stream_tokens(model, ids, 10, eos_token_id=[], cache=cache))
    assert torch.equal(torch.stack(tokens, 1), expected)
    assert fed == [7, *[1] * 9]


def test_logits_that_are_not_finite_are_named_by_row_and_token() -> None:
    model = Counter()
    with torch.no_grad():
        # A token's hidden state is sqrt(40) at its own place, and 0 elsewhere: token 4's product overflows.
        model.lm_head.weight[13, 4] = 3e38
    stream = stream_tokens(model, torch.tensor([[2, 2], [6, 3]]), 3)
    assert next(stream).tolist() == [3, 4]
    with pytest.raises(UserError, match=r"after 3 tokens, logits\[1, 13\] is inf \(row, token\)"):
        next(stream)


def test_do_sample_as_in_transformers() -> None:
    ids = torch.tensor([[2]])
    greedy = generate(Counter(), ids, 5)
    assert torch.equal(generate(Counter(), ids, 5, do_sample=False, temperature=1.0), greedy)
    model = Counter()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.manual_seed(0)
    sampled = generate(model, ids.expand(40, 1), 2, do_sample=True)
    assert sampled[:, 1].unique().numel() > 10


def test_generation_leaves_no_graph_and_trainable_tokens() -> None:
    model = Counter()
    ids = generate(model, torch.tensor([[2]]), 4)
    assert not ids.requires_grad
    assert not ids.is_inference()
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_length": 2}, "max_new_tokens=0 must be at least 1 .max_length counts the prompt, too"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": 1, "top_k": 0}, "top_k=0"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p=0.0"),
        ({"max_new_tokens": 1, "top_p": 1.5}, "top_p=1.5"),
        ({"max_new_tokens": 1, "attention_mask": torch.tensor([[1, 0]])}, "pad on the left"),
        ({"max_new_tokens": 1, "attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \[1, 3\]"),
    ],
)
def test_senseless_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(Counter(), torch.tensor([[2, 3]]), **options)
    with pytest.raises(UserError, match="at least one token"):
        generate(Counter(), torch.empty(1, 0, dtype=torch.long), 3)


NASTY = [
    "def main(",
    "a=b, c",
    'it\'s "quoted"',
    "back\\slash\\",
    "\\'",
    "${HOME} and \\${x} and \\\\${y}",
    "$x {y} [1, 2]",
    "two\nlines\tand a tab",
    "null",
    "1e5",
    "  spaces  ",
    "héllo 漢字",
    "",
]


@pytest.mark.parametrize("key", ["prompt", "system"])
@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_any_prompt_reaches_the_config_as_it_was_typed(text: str, key: str) -> None:
    override = OverridesParser.create().parse_overrides([quoted(f"{key}={text}")])[0]
    assert override.key_or_group == key
    config = OmegaConf.create({key: override.value()})
    assert config[key] == text


def test_other_arguments_are_left_alone() -> None:
    for argument in ["source=a(b)", "max_new_tokens=3", "--help", "prompt", "data.prompt=x"]:
        assert quoted(argument) == argument

"""`olmoe merge`: the mean, its rounding, the weights that make up for a decay, and what is refused."""

import json
import math
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.checkpoint.convert import merge as merge_module
from olmoe_train.checkpoint.convert.merge import decay_weights, given_weights, merged_reader, round_once
from olmoe_train.checkpoint.sharded import save_checkpoint
from olmoe_train.cli.merge import main as merge
from olmoe_train.cli.sources import collect_sources
from olmoe_train.config.choices import MergeDecay, Precision
from olmoe_train.config.verbs import MergeConfig
from olmoe_train.utils.errors import UserError
from tests.support.hf_directories import TINY, edit_json, edit_tensors, make, tensors_of
from tests.support.sizes import SIZES
from tests.support.tiny import build, train_step, whole

NORM = "model.norm.weight"


def mean(tensors: list[Tensor], weights: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    reads: list[Callable[[str], Tensor]] = [lambda _, tensor=tensor: tensor for tensor in tensors]  # type: ignore[misc]
    return merged_reader(reads, weights, dtype)("w")


def random_bits(number: int, dtype: torch.dtype) -> Tensor:
    """Finite values of every exponent, denormals among them, with both zeros."""
    integers = torch.int32 if dtype.itemsize == 4 else torch.int16
    limits = torch.iinfo(integers)
    values = torch.randint(limits.min, limits.max, (number,), dtype=integers).view(dtype)
    return torch.cat([torch.tensor([0.0, -0.0, 1e-45], dtype=dtype), values[values.isfinite()]])


def nearest(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The value of dtype that is nearest to an exact one, a tie to the even one, by search."""
    guess = torch.tensor(float(value)).to(dtype)
    around = [torch.nextafter(guess, torch.tensor(end, dtype=dtype)) for end in (-math.inf, math.inf)]
    candidates = [one for one in (guess, *around) if one.isfinite()]

    def distance(one: Tensor) -> tuple[Fraction, int]:
        return abs(Fraction(one.item()) - value), int(one.view(torch.int16).item()) % 2

    return Fraction(min(candidates, key=distance).item())


# --- the mean ---------------------------------------------------------------------------------------------


def test_mean_by_hand() -> None:
    tensors = [torch.tensor([1.0, -2.0]), torch.tensor([5.0, 2.0]), torch.tensor([3.0, 30.0])]
    assert mean(tensors, [0.5, 0.25, 0.25]).tolist() == [2.5, 7.0]
    assert mean(tensors, [2.0, -1.0, 0.0]).tolist() == [-3.0, -6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.7], [1 / 3] * 3, [3.1, -2.3, 0.2]], ids=str)
def test_equal_values_come_out_bit_for_bit(dtype: torch.dtype, weights: list[float]) -> None:
    values = random_bits(3000, dtype)
    integers = torch.int32 if dtype.itemsize == 4 else torch.int16
    merged = mean([values, values.clone(), values.clone()], weights, dtype)
    assert torch.equal(merged.view(integers), values.view(integers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_rounded_once(dtype: torch.dtype) -> None:
    assert round_once(torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64), torch.bfloat16) == 1 + 2**-7
    assert torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64).bfloat16() == 1  # what torch gives
    tensors = [torch.randn(400) * 10.0 ** torch.randint(-9, 3, (400,)) for _ in range(3)]
    # Beside the middle of two neighbors in bf16 and in fp16, of which the lower or the upper is even:
    # middle / 2 + middle / 2 + 2^-40.
    middles = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]).repeat(2)
    tensors[0][-8:], tensors[1][-8:] = middles, 2 * middles
    tensors[2][-8:] = torch.tensor([2.0**-38] * 4 + [-(2.0**-38)] * 4)
    weights = [0.5, 0.25, 0.25]
    exact = [
        sum(Fraction(w) * Fraction(x) for w, x in zip(weights, values, strict=True))
        for values in zip(*(tensor.tolist() for tensor in tensors), strict=True)
    ]
    found = [Fraction(one) for one in mean(tensors, weights, dtype).tolist()]
    assert found == [nearest(value, dtype) for value in exact]  # type: ignore[arg-type]


def test_a_mean_beyond_the_range_is_refused() -> None:
    big = torch.tensor([0.0, 3e38])
    with pytest.raises(
        UserError, match=r"the mean of w is beyond .*float32: \[1\] is inf; give other weights"
    ):
        mean([big, -big], [2.0, -1.0])


def test_memory_does_not_grow_with_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "CHUNK", 100)
    alive: list[int] = []
    count = 0

    def gone() -> None:
        nonlocal count
        count -= 1

    def read(_: str) -> Tensor:
        nonlocal count
        count += 1
        alive.append(count)
        tensor = torch.ones(1000)
        weakref.finalize(tensor, gone)
        return tensor

    merged_reader([read] * 6, [1 / 6] * 6, torch.float32)("w")
    assert alive == [1, 2, 2, 2, 2, 2]


# --- weights ----------------------------------------------------------------------------------------------


def test_weights_that_make_up_for_a_decay_by_hand() -> None:
    def weights(decay: str, *steps: int) -> Any:
        return pytest.approx(decay_weights(MergeDecay[decay], steps), abs=1e-15)

    assert weights("linear", 10, 20, 30, 40, 50) == [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8]
    # The mean of 1 - p is 2/3 from 0 to 2/3, and 1/6 from there to 1.
    assert weights("linear", 200, 400, 500) == [1 / 3, 1 / 2, 1 / 6]
    # The mean of (1 + cos(pi p)) / 2 is 1/2 + 1/pi in the first half.
    assert weights("cosine", 0, 1, 2) == [1 / 2 - 1 / math.pi, 2 / math.pi, 1 / 2 - 1 / math.pi]
    assert weights("sqrt", 0, 7) == [2 / 3, 1 / 3]


@pytest.mark.parametrize("decay", MergeDecay)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_mean_is_the_decayed_run_where_gradients_do_not_depend_on_weights(
    decay: MergeDecay, optimizer: type[torch.optim.Optimizer]
) -> None:
    saved = [0, 5, 9, 10, 20]  # steps
    gradients = torch.randn(20, 50, dtype=torch.float64)

    def train(multipliers: list[float]) -> list[Tensor]:
        weight = torch.nn.Parameter(torch.ones(50, dtype=torch.float64))
        steps = optimizer([weight], lr=0.1)  # type: ignore[call-arg]
        after = [weight.detach().clone()]
        for gradient, multiplier in zip(gradients, multipliers, strict=True):
            steps.param_groups[0]["lr"] = 0.1 * multiplier
            steps.zero_grad()
            (gradient @ weight).backward()
            steps.step()
            after.append(weight.detach().clone())
        return after

    def shape(progress: Any) -> Any:
        if decay is MergeDecay.cosine:
            return (1 + np.cos(np.pi * progress)) / 2
        return 1 - (progress if decay is MergeDecay.linear else np.sqrt(progress))

    # The mean of the shape in each interval, by quadrature over the root of the progress.
    nodes, quadrature = np.polynomial.legendre.leggauss(20)
    multipliers: list[float] = []
    for start, end in pairwise(saved):
        low, high = math.sqrt(start / 20), math.sqrt(end / 20)
        roots = (low + high) / 2 + (high - low) / 2 * nodes
        integral = (high - low) / 2 * np.sum(quadrature * shape(roots**2) * 2 * roots)
        multipliers += [float(integral) * 20 / (end - start)] * (end - start)
    constant, decayed = train([1.0] * 20), train(multipliers)
    merged = mean([constant[step] for step in saved], decay_weights(decay, saved), torch.float64)
    assert (merged - decayed[-1]).abs().max() < 1e-12
    assert (merged - constant[-1]).abs().max() > 0.1


def test_given_weights() -> None:
    assert given_weights("uniform", 4) == [0.25] * 4
    assert given_weights([1, 2, 1], 3) == [0.25, 0.5, 0.25]
    assert given_weights([-1.0, 3.0], 2) == [-0.5, 1.5]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("even", "weights=even: give uniform, or a list of numbers"),
        ([1, "b"], r"weights=\[1, 'b'\]: give uniform"),
        ([1, True], "give uniform"),
        ([1, 2, 3], "has 3 numbers for 2 sources"),
        ([1, math.inf], "must be finite"),
        ([0.1, -0.1], r"sum to 0, .* must not be 0"),
    ],
    ids=str,
)
def test_wrong_weights(weights: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        given_weights(weights, 2)


# --- the verb ---------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Two HF directories with other weights each and the same tokenizer."""
    for name, seed in (("a", 0), ("b", 1)):
        model = make(intermediate_size=8)  # a multiple of 16 bytes, for the grouped_mm of Transformers
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text('{"version": "1"}')
    edit_json(tmp_path / "a/generation_config.json", lambda content: content.update(temperature=0.7))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_transformers_loads_the_mean(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(tmp_path / "b/tokenizer.json", lambda content: content.update(padding={"length": 8}))
    merge(MergeConfig(pair, str(tmp_path / "out"), weights=[1, 3], max_shard_size="5KB"))
    printed = capsys.readouterr().out
    assert "averaging experts of different runs is only sensible if they share their initial" in printed
    assert f" 0.75000  {pair[1]}" in printed

    theirs = [transformers.OlmoeForCausalLM.from_pretrained(name) for name in pair]
    by_hand = transformers.OlmoeForCausalLM(theirs[0].config)
    first, second = (model.state_dict() for model in theirs)
    by_hand.load_state_dict(
        {n: (0.25 * w.double() + 0.75 * second[n].double()).float() for n, w in first.items()}
    )
    merged = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(2, TINY["vocab_size"], (2, 9))
    torch.testing.assert_close(merged.eval()(ids).logits, by_hand.eval()(ids).logits, rtol=1e-6, atol=1e-6)
    assert (merged(ids).logits - theirs[0].eval()(ids).logits).abs().max() > 0.1

    assert merged.generation_config.temperature == 0.7
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"version": "1"}
    card = (tmp_path / "out/README.md").read_text()
    assert f"| {pair[0]} | 0.25 |\n| {pair[1]} | 0.75 |" in card
    assert "# Mean of 2 models" in card


def test_what_is_there_is_left_alone(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    merge(MergeConfig(pair, out, precision=Precision.bf16))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    merge(MergeConfig(pair, out, precision=Precision.bf16))
    assert "already merged, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not empty, and does not hold this export"):
        merge(MergeConfig(pair, out, weights=[1, 2], precision=Precision.bf16))


def test_wrong_sources(pair: list[str], tmp_path: Path) -> None:
    def refused(sources: list[str], message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            merge(MergeConfig(sources, str(tmp_path / "out"), **options))
        assert not (tmp_path / "out").exists()

    refused([], r"sources=\[\] names no model")
    refused([pair[0], "nowhere"], "nowhere: neither an HF directory")
    refused(pair[:1], "a mean needs at least two")
    refused([*pair, f"{pair[0]}/"], r"sources has .*a twice")
    refused(pair, "decay=linear and weights=.*: both give", weights=[1, 2], decay=MergeDecay.linear)
    make(intermediate_size=8, num_experts_per_tok=3).save_pretrained(tmp_path / "other")
    refused([pair[0], str(tmp_path / "other")], "num_experts_per_tok is 3 there and 2 in .*/a")
    edit_tensors(tmp_path / "b", lambda tensors: tensors[NORM].fill_(math.nan))
    refused(pair, f"{NORM}.* is nan")
    (tmp_path / "b/tokenizer.json").write_text('{"version": "2"}')
    refused(pair, "b has another tokenizer than .*a")


def test_source_and_sources_on_the_command_line() -> None:
    assert collect_sources(["source=a", "out=x", "source=b"], "sources") == ["out=x", "sources=['a','b']"]
    assert collect_sources(["sources=[a,b]"], "sources") == ["sources=[a,b]"]


def train(run_dir: Path) -> dict[int, Tensor]:
    """Checkpoints of steps 1, 2 and 4, and one parameter of each."""
    model, optimizer = build()
    saved = {}
    for step in (1, 2, 4):
        train_step(model, optimizer, step)
        save_checkpoint(run_dir, step, model, optimizer, {"step": step, "tokens": step})
        saved[step] = whole(dict(model.named_parameters())[NORM]).double()
    return saved


@pytest.fixture
def process_group() -> Iterator[None]:
    yield
    dist.destroy_process_group()


def test_checkpoints_of_a_run(
    tmp_path: Path, process_group: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    saved = train(tmp_path / "run")
    OmegaConf.save({"model": SIZES, "seed": 1}, tmp_path / "run/config.yaml")

    def merged(out: str, sources: list[str], **options: Any) -> tuple[Tensor, str]:
        merge(MergeConfig(sources, str(tmp_path / out), **options))
        return tensors_of(tmp_path / out)[NORM], capsys.readouterr().out

    found, printed = merged("uniform", [f"{run}@2", run])
    assert torch.equal(found, ((saved[2] + saved[4]) / 2).float())
    assert "warning" not in printed
    # The mean of 1 - p is 5/6 in the first third, and 1/3 in the others.
    by_hand = (saved[1] + 3 * saved[2] + 2 * saved[4]) / 6
    found, printed = merged("decay", [f"{run}@all"], decay=MergeDecay.linear)
    torch.testing.assert_close(found, by_hand.float(), rtol=1e-7, atol=0)
    assert "warning" not in printed
    records = [{"step": step, "train/lr": lr} for step, lr in ((1, 0.2), (4, 0.1), (5, 0.0))]
    (tmp_path / "run/metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    found, printed = merged("again", [f"{run}@all"], decay=MergeDecay.linear)
    assert "its learning rate went from 0.2 to 0.1 from step 1 to 4" in printed

    with pytest.raises(UserError, match="sources has the steps 4, 2, and a decay goes forward in time"):
        merged("backward", [run, f"{run}@2"], decay=MergeDecay.linear)
    with pytest.raises(UserError, match=r"sources has step-00000004 of .* twice"):
        merged("twice", [run, f"{run}@4"])
    with pytest.raises(UserError, match=r"step=3: .* complete steps: 4, 2, 1"):
        merged("none", [run, f"{run}@3"])

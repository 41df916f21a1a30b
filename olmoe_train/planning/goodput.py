"""Goodput of a run with failures, and the checkpoint interval with which it is best.

Goodput is the time of the steps that count, as a fraction of all time: without saves, restarts, and steps
that are made again. Failures come independently of each other at a constant rate, during steps, saves and
restarts alike. tests/planning/test_goodput.py compares this with simulated weeks.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974;
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006,
doi 10.1016/j.future.2004.11.016.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """Failures of a run, in seconds."""

    mean_between: float
    """Mean time between failures of the whole run (MTBF)."""
    restart: float
    """From a failure to the first new step, with the checkpoint read."""


@dataclass(frozen=True)
class Save:
    """One save, in seconds."""

    blocked: float
    """For which training waits."""
    background: float = 0.0
    """From then on until the checkpoint is complete, while training continues; 0 if it is synchronous. The
    next save waits for it. A failure before it ends goes back to the checkpoint before."""


def young_interval(save: Save, failures: Failures) -> float:
    """Seconds of steps between saves, to first order: sqrt(2 d M), for a save of d and an MTBF of M."""
    return math.sqrt(2 * save.blocked * failures.mean_between)


def daly_interval(save: Save, failures: Failures) -> float:
    """Seconds of steps between saves, to higher order (Daly 2006): with x = d / 2M

    sqrt(2 d M) (1 + sqrt(x) / 3 + x / 9) - d, and M for saves longer than 2 M.
    """
    half = save.blocked / (2 * failures.mean_between)
    if half >= 1:
        return failures.mean_between
    return young_interval(save, failures) * (1 + math.sqrt(half) / 3 + half / 9) - save.blocked


def goodput(interval: float, save: Save, failures: Failures) -> float:
    """Goodput with a save after every `interval` seconds of steps, 0 to 1.

    With interval t, save d, restart R and MTBF M, a synchronous save takes the run from one checkpoint to the
    next in M e^(R/M) (e^((t + d)/M) - 1) seconds on average (Daly 2006).

    In the background, a failure in the first w seconds of an interval goes back by two intervals. Let A be
    the time above, from a complete checkpoint to the next save, and D the time from one save to the next. An
    interval of P = t + d takes M (1 - e^(-P/M)) seconds until it ends or fails. Each failure costs a restart,
    M (e^(R/M) - 1), and A; those in the first w seconds, a part 1 - e^(-w/M) of all intervals, also D again:

    D = M (1 - e^(-P/M)) + (1 - e^(-P/M)) (M (e^(R/M) - 1) + A) + (1 - e^(-w/M)) D
      = M e^((R + w)/M) (e^(P/M) - 1).
    """
    mean = failures.mean_between
    period = max(interval, save.background) + save.blocked
    if (period + save.background + failures.restart) / mean > 500:
        return 0.0  # e^500 of the mean: no interval ever ends
    needed = mean * math.exp((failures.restart + save.background) / mean) * math.expm1(period / mean)
    return interval / needed


def best_every(step_seconds: float, save: Save, failures: Failures) -> int:
    """Best checkpoint.every in steps: Daly's interval, but not less than a save in the background takes."""
    steps = round(daly_interval(save, failures) / step_seconds)
    return max(1, steps, math.ceil(save.background / step_seconds))

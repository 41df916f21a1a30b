"""The alarms of the metrics in the registry; run/alarms.py compares values with the thresholds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """When a metric's value is bad news."""

    name: str
    """Title of the alert."""
    key: str
    """Field of `logging.alarms` that holds the threshold."""
    text: str
    """What is wrong, and what helps; formatted with `value`."""
    is_above: bool = True
    """Whether the alarm is for values above the threshold, not below it."""
    is_lasting: bool = False
    """Whether the value must be beyond the threshold for `logging.alarms.collapse_steps` steps."""


SKIPPED_STEPS = Alarm(
    "skipped steps",
    "skipped_steps",
    "{value} updates of the run were skipped, because a gradient or a loss was not finite or was a spike",
)
UNEVEN_LOAD = Alarm(
    "router collapse: load",
    "max_violation",
    "router/max_violation is {value:.2f}: almost every token of a layer goes to one expert; raise "
    "loss.router_aux_loss_coef, or lower optimizer.lr",
    is_lasting=True,
)
LOW_ENTROPY = Alarm(
    "router collapse: entropy",
    "entropy",
    "router/entropy is only {value:.3f} nats: the routers put almost all probability on one expert "
    "per token; raise loss.router_z_loss_coef, or lower optimizer.lr",
    is_above=False,
    is_lasting=True,
)
DEAD_EXPERTS = Alarm(
    "dead experts",
    "dead_experts",
    "{value} experts have had no token for logging.dead_expert_steps steps",
)

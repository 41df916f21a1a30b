"""Compare a resumed run with the run that made the checkpoint, and decide whether each change is allowed."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from olmoe_train.config.aliases import current_key, current_saved_config
from olmoe_train.config.choices import BalanceScope
from olmoe_train.config.choices import Schedule as Kind
from olmoe_train.config.expert_file import read_experts
from olmoe_train.data.fingerprint import stream_changes
from olmoe_train.data.loader import TrainingData
from olmoe_train.model.adapters.spec import BaseIdentity
from olmoe_train.optim.schedule import Schedule
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import redact

log = logging.getLogger(__name__)
# Keys and sections that do not affect the weights: where and how to compute, and what to log. Changing any
# other key changes the result.
SAFE_TO_CHANGE = (
    "model.init_from",  # sets only the initial weights; the checkpoint has later weights
    "model.revision",
    "model.adapter_from",  # sets only the initial values of the adapter
    "model.bos_token_id",  # only written to exports; before, a run had null where init_from has a token
    "model.initializer_range",  # only of initial weights
    "model.initialization",
    "model.trust_pickle",  # how model.init_from is read
    "model.strip_prefix",
    "model.experts_backend",
    "data.dir",  # content and shares of the data are compared by fingerprint
    "data.mixture",
    "data.stages",
    "data.verify_hashes",
    "data.num_workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.cache_block_kib",
    "data.source",
    "objective.reference",  # where the same log-probabilities come from
    "objective.logprobs_dir",  # their hashes are compared
    "trainer.stop_at_step",
    "trainer.micro_batch_size",
    "trainer.device",
    "trainer.log_every",
    "trainer.timeout",
    "trainer.rendezvous_timeout",
    "trainer.max_skipped_steps",
    "trainer.spike_sigmas",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.fused_backward",
    "parallel",
    "checkpoint",
    "logging",
    "evaluation",
)
# Objectives that pack the samples of a micro-batch, so that packing changes no result; and its keys.
PACK_WITHIN_BATCHES = ("preference", "grpo")
PACKING_KEYS = ("data.packing", "data.mask_documents")
# What a branch may change. Its own checkpoints then hold the new values.
BRANCH_MAY_CHANGE = ("scheduler",)
# These keys act only through the steps at which the phases of the schedule end, and through the shape of the
# decay. Those are compared instead.
SCHEDULE_KEYS = (
    "trainer.max_steps",
    "trainer.max_tokens",
    "trainer.max_epochs",
    "scheduler.warmup_steps",
    "scheduler.warmup_tokens",
    "scheduler.warmup_fraction",
    "scheduler.decay_steps",
    "scheduler.decay_tokens",
    "scheduler.decay_length_steps",
    "scheduler.decay_length_tokens",
    "scheduler.decay_fraction",
    "scheduler.decay_shape",
)
# Scopes of the load-balancing loss for which it matters which sequences go through the model at the same
# time.
SCOPES_OF_A_PASS = (BalanceScope.all_ranks.name, BalanceScope.running.name)
# Parts of the data's fingerprint that are also configuration keys.
ALSO_CONFIG = ("seed", "sequence_length")


@dataclass(frozen=True)
class Change:
    """One key whose value in the checkpoint differs from its value now. None stands for an absent key."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before} in the checkpoint, {self.now} now"


def resume_fingerprint(
    config: dict[str, Any], schedule: Schedule, data: TrainingData, base: BaseIdentity | None = None
) -> dict[str, Any]:
    """Return what a checkpoint records about its run: configuration, schedule and data order.

    Args:
        config: The configuration as plain values (`plain_values`). Secrets are redacted, and `run_dir` is
            left out. trainer.train_only gives way to what its file names.
        schedule: The learning-rate schedule.
        data: The training data.
        base: The frozen weights that an adapter is trained on. None: there is no adapter.

    Returns:
        JSON values with the keys `config`, `schedule`, `balancing`, `fingerprint` and `base`.
    """
    effect: dict[str, Any] = {"step at which the warm-up ends": schedule.warmup_end}
    if schedule.cfg.kind is Kind.wsd:
        effect["step at which the decay begins"] = schedule.decay_start
        effect["shape of the decay"] = schedule.shape.name
    if schedule.cfg.kind is not Kind.constant:
        effect["step at which the decay ends"] = schedule.decay_end
    config = {key: value for key, value in config.items() if key != "run_dir"}
    if (path := config["trainer"].get("train_only")) is not None:
        model = config["model"]
        named = read_experts(Path(path).expanduser(), model["num_hidden_layers"], model["num_experts"])
        config |= {"trainer": config["trainer"] | {"train_only": named.plain_values()}}
    return {
        "config": redact(config),
        "schedule": effect,
        "balancing": counted_together(config, dist.get_world_size()),
        "fingerprint": data.fingerprint(),
        "base": None if base is None else asdict(base),
    }


def counted_together(config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Return what a loss with a scope of SCOPES_OF_A_PASS depends on besides the configuration.
    Empty: there is no such loss, or one pass is the whole step."""
    trainer = config["trainer"]
    sequences = trainer["micro_batch_size"]
    if config["balancing"].get("scope") not in SCOPES_OF_A_PASS or not config["loss"]["router_aux_loss_coef"]:
        return {}
    if sequences * ranks == trainer["global_batch_size"]:
        return {}
    return {"sequences of one pass": f"{sequences} on each of {ranks} ranks"}


def check_changes(
    saved: dict[str, Any],
    now: dict[str, Any],
    allow_changes: list[str],
    checkpoint: Path,
    may_change: tuple[str, ...] = (),
) -> None:
    """Compare a checkpoint's saved state with this run, and log the changes that are allowed.

    Args:
        saved: The saved state of the checkpoint.
        now: The `resume_fingerprint` of this run.
        allow_changes: Keys that the user lets change (checkpoint.allow_changes).
        checkpoint: The checkpoint, for the message.
        may_change: Keys or sections that may change although they affect the result.

    Raises:
        UserError: A change affects the result and checkpoint.allow_changes does not name its key. The message
            lists all such changes. Or the checkpoint holds an adapter of another base, or was trained with
            other experts in trainer.train_only.
    """
    _check_base(saved.get("base"), now["base"], checkpoint)
    _check_trained_experts(saved["config"], now["config"], checkpoint)
    allowed = [current_key(key) for key in allow_changes]
    refused = []
    for change in changes(saved, now):
        if _within(change.key, may_change) or not changes_the_result(change.key, now["config"]):
            log.info("changed since the checkpoint: %s", change)
        elif _within(change.key, allowed):
            log.warning("WARNING: changed since the checkpoint, and allowed to: %s", change)
        else:
            refused.append(change)
    if refused:
        keys = ",".join(sorted({_bare(change.key) for change in refused}))
        what = f"{checkpoint} was made by a run that computes something else:"
        fix = f"restore these values, or accept the changes: checkpoint.allow_changes=[{keys}]"
        raise UserError("\n  ".join([what, *map(str, refused), fix]))


def _check_base(saved: dict[str, str] | None, now: dict[str, str] | None, checkpoint: Path) -> None:
    """Refuse an adapter of other weights; no key allows that. The path of the weights may change."""
    if saved is not None and now is not None and saved["xxh3_128"] != now["xxh3_128"]:
        raise UserError(
            f"{checkpoint} holds an adapter of other weights than those of model.init_from ({now['path']}): "
            f"their hash is {now['xxh3_128']}, and that of the adapter's base {saved['xxh3_128']}; set "
            f"model.init_from to the model that was at {saved['path']}"
        )


def _check_trained_experts(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Refuse other experts in trainer.train_only; no key allows that. The moments of experts that were
    trained would move them after they are frozen."""
    before, after = (config.get("trainer", {}).get("train_only") for config in (saved, now))
    if before != after:
        raise UserError(
            f"{checkpoint} was made by a run that trains other weights: trainer.train_only names {before} in "
            f"the checkpoint, {after} now (null: everything). Restore it; or begin a new run from an export "
            "of the checkpoint (model.init_from)"
        )


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Return every difference between two fingerprints, one `Change` per key.

    A key that is absent from one of the fingerprints counts as null there.
    """
    before, after = (
        _flat(current_saved_config(of["config"]))
        | {f"scheduler ({key})": value for key, value in of["schedule"].items()}
        | {f"balancing ({key})": value for key, value in of.get("balancing", {}).items()}
        for of in (saved, now)
    )
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    # The samples that were drawn are the same; what stages later in the data have may change.
    of_data = stream_changes(saved["fingerprint"], now["fingerprint"], saved.get("samples"))
    return [Change(key, before.get(key), after.get(key)) for key in keys] + [
        Change(f"data ({key})", *values) for key, values in of_data.items() if key not in ALSO_CONFIG
    ]


def changes_the_result(key: str, config: dict[str, Any]) -> bool:
    """Return whether a change of this key of a run's configuration affects the weights.

    The micro-batch size affects the weights only if the load-balancing loss has a weight and is computed per
    micro-batch. Where it is computed over the micro-batches of all ranks, their size and number are compared
    by `counted_together`. The keys of the schedule count as no change, because the schedule itself is
    compared.
    """
    if (
        key == "trainer.micro_batch_size"
        and config["balancing"].get("scope") == BalanceScope.micro_batch.name
    ):
        return bool(config["loss"]["router_aux_loss_coef"] != 0)
    if key in PACKING_KEYS and config["objective"]["name"] in PACK_WITHIN_BATCHES:
        return False
    return not _within(key, SAFE_TO_CHANGE) and key not in SCHEDULE_KEYS


def _within(key: str, names: tuple[str, ...] | list[str]) -> bool:
    """Return whether `names` contains this key or a section that contains it.

    Text in parentheses after the key is an explanation and is ignored.
    """
    bare = _bare(key)
    return any(bare == name or bare.startswith(f"{name}.") for name in names)


def _bare(key: str) -> str:
    """The key without an explanation, and of an element of a list the list's key."""
    return key.split(" ")[0].split("[")[0]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; those of the second element of a list of objects are list[1].key. An empty list
    is left out, as if the key were absent."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            flat |= _flat({f"{key}[{index}]": one for index, one in enumerate(value)}, prefix)
        else:
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

"""Name the documents of one optimizer step of a run, with their shares of its loss and gradient.

The order of the samples is a function of the seed and the index, so nothing of a step has to be stored. The
weights are those of the newest checkpoint before the step, or the initial weights if there is none.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track

from olmoe_train.checkpoint.branch import checkpoint_before
from olmoe_train.checkpoint.directory import complete_checkpoints
from olmoe_train.checkpoint.sharded import load_checkpoint, saved_state
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.help import description
from olmoe_train.cli.ranks import on_ranks
from olmoe_train.config.verbs import ExplainConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.fingerprint import stream_changes
from olmoe_train.data.loader import RankMicroBatches, TrainingData
from olmoe_train.distributed.collectives import on_rank_0
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.distributed.rendezvous import leave_distributed
from olmoe_train.run.loggers import read_records
from olmoe_train.training.build import build_data, build_model, count_steps
from olmoe_train.training.build_objective import build_objective
from olmoe_train.training.explain.content import (
    as_json,
    document_records,
    layer_shift,
    missing_origins,
    where,
)
from olmoe_train.training.explain.documents import Key, StepDocuments, StepLosses, step_losses
from olmoe_train.training.explain.gradients import StepGradient, step_gradient
from olmoe_train.training.explain.own_batches import has_own_batches
from olmoe_train.training.preflight.explained_run import run_to_explain
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import write_out
from olmoe_train.utils.finite import finite_or_none


def main(cfg: ExplainConfig) -> None:
    """Explain the step: write the JSON file, and print the documents that were looked at closely."""
    if cfg.step < 1:
        raise UserError(f"step={cfg.step}: steps are counted from 1")
    if cfg.top < 1:
        raise UserError(f"top={cfg.top}: must be at least 1")
    device = init_distributed(cfg.device.value, device_key="device")
    try:
        content = explain(cfg, device)
        run_dir = Path(cfg.source).expanduser()
        out = Path(cfg.out).expanduser() if cfg.out else run_dir / "explain" / f"step-{cfg.step:08d}.json"
        on_rank_0(lambda: write_out(out, as_json(content)))
        if dist.get_rank() == 0:
            print(table(content, cfg.top))
            print(f"all {len(content['documents']):,} documents: {out}")
    finally:
        leave_distributed(60.0)


def explain(cfg: ExplainConfig, device: torch.device) -> dict[str, Any]:
    """Compute what the JSON file holds. Collective; complete on rank 0."""
    run_dir = Path(cfg.source).expanduser()
    checkpoint = checkpoint_before(run_dir, cfg.step)
    run = run_to_explain(cfg, run_dir, checkpoint is not None)
    data = build_data(run)
    if cfg.step > (last := count_steps(run, data)):
        raise UserError(f"step={cfg.step}: the run in {run_dir} has {last} steps")
    state = {"step": 0, "samples": 0} if checkpoint is None else saved_state(checkpoint)
    check_data(run_dir, data)
    sizes = BatchSizes.of(run.trainer, run.data.sequence_length)
    first = sizes.samples_after(cfg.step - 1 - state["step"], state["samples"])
    if has_own_batches(run_dir, first):
        raise UserError(
            f"source={run_dir}: its batches were given to train(batches=...), not read from data.dir, so the "
            "documents of its steps are not known"
        )
    micro_batch, world = run.trainer.micro_batch_size, dist.get_world_size()
    order = RankMicroBatches(first, sizes, dist.get_rank(), world, micro_batch)
    step = StepDocuments(data.samples, order.of_one_step())

    model = build_model(run, build_mesh(run.parallel, device))
    if checkpoint is not None:
        load_checkpoint(checkpoint, model)
    losses = step_losses(model, step, device)
    closely = [document.key for document in losses.documents[: cfg.top]]
    routing = losses.routing(closely)
    gradient = None
    if cfg.gradients:
        objective = build_objective(run, model, data, device)
        gradient = step_gradient(model, objective, step, closely, device, progress)
    return {
        "step": cfg.step,
        "run": str(run_dir),
        "weights": {
            "checkpoint": None if checkpoint is None else checkpoint.name,
            "after_step": state["step"],
            "exact": state["step"] == cfg.step - 1,
        },
        "samples": [first, first + sizes.after(first)],
        **step_values(losses, gradient),
        "recorded": recorded_values(run_dir, cfg.step),
        "documents": document_records(data.samples, losses, closely, routing, gradient),
        "notes": missing_origins(data.samples),
    }


def check_data(run_dir: Path, data: TrainingData) -> None:
    """Refuse data that is not the run's, by the fingerprint in a checkpoint of the run, if it has any."""
    checkpoints = complete_checkpoints(run_dir)
    saved = saved_state(checkpoints[0]) if checkpoints else {}
    before = saved.get("fingerprint")
    changed = stream_changes(before, data.fingerprint(), saved["samples"]) if before else {}
    if changed:
        raise UserError(
            f"data.dir={data.cfg.dir} is not what the run was trained on: {', '.join(changed)} differ from "
            f"{checkpoints[0]}; give the run's data as data_dir"
        )


def progress(keys: Iterable[Key]) -> Iterator[Key]:
    """Show a progress bar on rank 0 while the gradients of the documents are computed."""
    listed, console = list(keys), Console(stderr=True)
    hidden = dist.get_rank() != 0 or not console.is_terminal
    yield from track(listed, "gradients", total=len(listed), console=console, disable=hidden)


def step_values(losses: StepLosses, gradient: StepGradient | None) -> dict[str, Any]:
    """The values of the step as a whole."""
    values: dict[str, Any] = {
        "ce_loss": finite_or_none(losses.ce_loss),
        "targets": losses.targets,
        "tokens": sum(document.tokens for document in losses.documents),
    }
    if gradient is not None:
        values["terms"] = {name: finite_or_none(value) for name, value in gradient.terms.items()}
        values["grad_norm"] = finite_or_none(gradient.norm)
        values["gradient_shares"] = {
            "documents": finite_or_none(gradient.cross_entropy.share),
            "of them not looked at closely": finite_or_none(gradient.others_share),
            "router losses": finite_or_none(gradient.router_share),
        }
    return values


def recorded_values(run_dir: Path, step: int) -> dict[str, Any] | None:
    """Loss and gradient norm of the step in metrics.jsonl. None: the step was not logged."""
    for record in reversed(read_records(run_dir / "metrics.jsonl")):
        if record["step"] == step and "train/ce_loss" in record:
            return {name: record.get(f"train/{name}") for name in ("loss", "ce_loss", "grad_norm")}
    return None


def table(content: dict[str, Any], top: int) -> str:
    """What is printed: the step, the weights that were used, and a line for each of the first documents."""
    columns = "rank  tokens  loss/token  of the loss  of the gradient  routing  document"
    lines = [*heading(content), "", columns]
    several = len({record["source"] for record in content["documents"]}) > 1
    for record in content["documents"][:top]:
        share = record["loss_share"]
        of_loss = None if share is None or not content["ce_loss"] else share / content["ce_loss"]
        values = (
            f"{record['rank']:>4}",
            f"{record['tokens']:>6}",
            number(record["loss_per_token"], "10.4f"),
            number(of_loss, "11.2%"),
            number(record.get("gradient_share"), "15.2%"),
            number(layer_shift(record), "7.3f"),
            (f"{record['source']}: " if several else "") + where(record),
            repr(record["text"]) if record.get("text") is not None else "",
        )
        lines.append("  ".join(values).rstrip())
    lines += ["", *(f"note: {note}" for note in content["notes"])]
    return "\n".join(lines).rstrip()


def heading(content: dict[str, Any]) -> list[str]:
    """The lines above the documents."""
    weights, recorded = content["weights"], content["recorded"] or {}
    which = weights["checkpoint"] or "the initial weights"
    if not weights["exact"]:
        which += f", {content['step'] - 1 - weights['after_step']} steps older than those of the step"
    first, last = content["samples"]
    count = f"{len(content['documents']):,} documents, {content['targets']:,} target tokens"
    lines = [
        f"step {content['step']}: sequences {first:,} to {last - 1:,} of the data order, {count}",
        f"weights          {which}",
    ]
    values = {"ce_loss": content["ce_loss"], "grad_norm": content.get("grad_norm")}
    for name, value in values.items():
        if value is not None:
            log = f" (metrics.jsonl: {recorded[name]:.4f})" if recorded.get(name) is not None else ""
            lines.append(f"{name:<16} {value:.4f}{log}")
    if (shares := content.get("gradient_shares")) is not None and shares["documents"] is not None:
        parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        lines.append(f"gradient         {parts}")
    return lines


def number(value: float | None, form: str) -> str:
    """A number in a column; a dash where there is none."""
    width = int(form.split(".")[0])
    return "-".rjust(width) if value is None else format(value, form)


def run() -> int:
    """Run `olmoe explain` with the command line; returns the exit code."""
    return on_ranks(
        "olmoe_train.cli.explain",
        partial(run_verb, "explain", ExplainConfig, main, description("explain", __doc__)),
    )


if __name__ == "__main__":
    sys.exit(run())

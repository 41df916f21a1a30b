"""What a run shows of itself: sums kept on the device between logged steps, metrics.jsonl, the console
line, wandb.

Observes only: nothing here changes a step. Shapes: L layers, E experts, T tokens.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor

from olmoe_train.config.choices import Packing, Precision
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.loader import TrainSamples
from olmoe_train.evaluation.perplexity import Evaluation
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.outputs import TrainingOutput
from olmoe_train.planning.flops import peak_flops, train_flops_per_token
from olmoe_train.run.loggers import forget_after, start_wandb
from olmoe_train.training.state import Progress
from olmoe_train.training.throughput import peak_memory_gib
from olmoe_train.utils.redaction import redact

if TYPE_CHECKING:
    from olmoe_train.training.batch import Totals
    from olmoe_train.training.objectives.next_token import Losses

log = logging.getLogger("olmoe")
LOSS_NAMES = ("train/loss", "train/ce_loss", "train/load_balancing_loss", "train/router_z_loss")


class StepMetrics:
    """This rank's sums over the current step, on the device. `read` is the only place that waits for them."""

    def __init__(
        self, config: OlmoeConfig, cfg: TrainConfig, progress: Progress, device: torch.device
    ) -> None:
        self.progress = progress
        self.dead_after = cfg.logging.dead_expert_steps
        self.data = cfg.data
        self.sequences = self.tokens = self.without_targets = self.repetitive = 0  # since they were read
        shape = (config.num_hidden_layers, config.num_experts)
        self.last_used_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        if progress.expert_last_used is not None:
            self.last_used_LE += torch.tensor(progress.expert_last_used, device=device)
        self.losses = torch.zeros(len(LOSS_NAMES), device=device)
        self.counts_LE = torch.zeros(shape, device=device)
        self.entropy_L = torch.zeros(shape[0], device=device)

    @torch.no_grad()
    def add(
        self,
        losses: "Losses",
        output: TrainingOutput,
        mask: Tensor | None,
        totals: "Totals",
        with_entropy: bool,
    ) -> None:
        """Count in one micro-batch of step progress.step + 1. mask: [T] or [B, S], 0 at padding.

        with_entropy: for a step that will be logged; it is another pass over the router's probabilities.
        """
        self.losses += torch.stack(
            [losses.total, losses.ce_loss, losses.load_balancing_loss, losses.router_z_loss]
        )
        self.counts_LE += losses.counts_LE
        if with_entropy:
            self.entropy_L += router_entropy(output.router_logits, mask) / totals.tokens

    def end_step(self, totals: "Totals", samples: int) -> Progress:
        """Where the run stands after this step. The sums stay for `read` until `start_step`."""
        self.sequences += samples
        self.tokens += totals.tokens_int
        self.without_targets += totals.sequences_without_targets
        self.repetitive += totals.repetitive_sequences
        done = self.progress
        self.last_used_LE.masked_fill_(self.counts_LE > 0, done.step + 1)
        self.progress = Progress(done.step + 1, done.tokens + totals.tokens_int, done.samples + samples)
        return self.progress

    def start_step(self) -> None:
        for sums in (self.losses, self.counts_LE, self.entropy_L):
            sums.zero_()

    def last_used(self) -> list[list[int]]:
        """For each layer and expert, the last step in which any rank sent it a token; collective."""
        last_used_LE = self.last_used_LE.clone()
        dist.all_reduce(last_used_LE, dist.ReduceOp.MAX)
        return last_used_LE.tolist()

    def read(self, grad_norm: Tensor) -> dict[str, float]:
        """The step's values over the whole global batch, by their names in metrics.jsonl; collective."""
        layers, experts = self.counts_LE.shape
        sums = torch.cat([self.losses, self.counts_LE.flatten(), self.entropy_L])
        dist.all_reduce(sums)
        losses, counts, entropy_L = sums.cpu().split([len(LOSS_NAMES), layers * experts, layers])
        load_LE = counts.view(layers, experts)
        violation_L = load_LE.max(-1).values / load_LE.mean(-1).clamp(min=1e-9) - 1
        dead_L = [
            sum(self.progress.step - step >= self.dead_after for step in used) for used in self.last_used()
        ]
        values = dict(zip(LOSS_NAMES, losses.tolist(), strict=True))
        values |= self._read_data()
        values["train/grad_norm"] = grad_norm.item()
        values["router/max_violation"] = violation_L.max().item()
        values["router/entropy"] = entropy_L.mean().item()
        values["router/dead_experts"] = sum(dead_L)
        for layer in range(layers):
            prefix = f"router/layer_{layer:02d}"
            values[f"{prefix}/max_violation"] = violation_L[layer].item()
            values[f"{prefix}/entropy"] = entropy_L[layer].item()
            values[f"{prefix}/dead_experts"] = dead_L[layer]
            values[f"{prefix}/load"] = (load_LE[layer] / load_LE[layer].sum().clamp(min=1)).tolist()
        return values

    def _read_data(self) -> dict[str, float]:
        """Of all sequences since the last time; the sums start again."""
        values: dict[str, float] = {"data/sequences_without_targets": self.without_targets}
        if self.data.repetition_filter:
            values["data/repetitive_sequences"] = self.repetitive
        if self.data.packing is Packing.best_fit:
            values["data/padding"] = 1 - self.tokens / (self.sequences * self.data.sequence_length)
        self.sequences = self.tokens = self.without_targets = self.repetitive = 0
        return values


def router_entropy(router_logits: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """[L]: sum over unpadded tokens of the entropy of the routing distribution, in nats; ln(E) a token is
    uniform."""
    entropies = []
    for logits_TE in router_logits:
        log_probs_TE = logits_TE.log_softmax(-1)
        entropy_T = -(log_probs_TE.exp() * log_probs_TE).sum(-1)
        entropies.append(
            entropy_T.sum() if mask is None else (entropy_T * mask.reshape(-1).to(entropy_T)).sum()
        )
    return torch.stack(entropies)


class MetricsWriter:
    """metrics.jsonl, the console and wandb; rank 0 writes, every rank keeps time."""

    def __init__(
        self, cfg: TrainConfig, run_dir: Path, config: OlmoeConfig, progress: Progress, device: torch.device
    ) -> None:
        self.device = device
        dtype = torch.bfloat16 if cfg.trainer.precision is Precision.bf16 else torch.float32
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.flops_per_token = train_flops_per_token(config, cfg.data.sequence_length).total
        self.peak_flops = peak_flops(name, dtype)
        self.warned_dead = 0
        self.mixture = TrainSamples(cfg.data, cfg.seed) if cfg.data.mixture else None
        self.wandb = None
        self.path = run_dir / "metrics.jsonl"
        if dist.get_rank() == 0:
            forget_after(self.path, progress.step)
            values = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
            self.wandb = start_wandb(cfg.logging.wandb, run_dir, redact(values))
        self.restart_clock(progress.tokens)

    def restart_clock(self, tokens: int) -> None:
        """Time validation and checkpoints out of the throughput."""
        self.started, self.tokens_at_restart = time.perf_counter(), tokens

    def log_step(
        self, progress: Progress, values: dict[str, Any], learning_rate: float, last_step: int
    ) -> None:
        elapsed = time.perf_counter() - self.started
        speed = (progress.tokens - self.tokens_at_restart) / elapsed
        self.restart_clock(progress.tokens)
        values = {"step": progress.step, "tokens": progress.tokens, **values, "train/lr": learning_rate}
        values |= self._mixture_shares(progress)
        values["perf/tokens_per_second"] = speed
        values["perf/mfu"] = None
        if self.peak_flops is not None:
            values["perf/mfu"] = speed * self.flops_per_token / (self.peak_flops * dist.get_world_size())
        values["perf/peak_memory_gib"] = peak_memory_gib(self.device)
        mfu = f" | mfu {values['perf/mfu']:.1%}" if values["perf/mfu"] is not None else ""
        log.info(
            f"step {progress.step}/{last_step} | loss {values['train/loss']:.4f}"
            f" | ce {values['train/ce_loss']:.4f} | balance {values['train/load_balancing_loss']:.3f}"
            f" | z {values['train/router_z_loss']:.3f}"
            f" | grad norm {values['train/grad_norm']:.3f} | lr {learning_rate:.2e} | {speed:,.0f} tok/s{mfu}"
        )
        self._warn_of_dead_experts(int(values["router/dead_experts"]))
        self._write(values)

    def log_evaluation(self, progress: Progress, evaluations: dict[str, Evaluation]) -> None:
        """evaluations: by the name of their data; see evaluate_data."""
        values: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        for name, evaluation in evaluations.items():
            log.info(
                f"step {progress.step} | {name} loss {evaluation.loss:.4f}"
                f" | perplexity {evaluation.perplexity:.2f} | {evaluation.tokens:,} tokens"
            )
            values[f"eval/{name}/loss"] = evaluation.loss
            values[f"eval/{name}/perplexity"] = evaluation.perplexity
        self._write(values)
        self._log_mixture(progress)
        self.restart_clock(progress.tokens)

    def _log_mixture(self, progress: Progress) -> None:
        """What each source was to have of the tokens, and has had."""
        if self.mixture is not None:
            for name, share in self.mixture.shares(progress.samples).items():
                log.info(
                    f"step {progress.step} | {name}: {share['share']:.2%} of the tokens so far, "
                    f"{share['requested_share']:.2%} asked for | {share['epochs']:.3f} epochs"
                )

    def _mixture_shares(self, progress: Progress) -> dict[str, float]:
        if self.mixture is None:
            return {}
        shares = self.mixture.shares(progress.samples)
        return {f"data/{name}/{key}": value for name, share in shares.items() for key, value in share.items()}

    def close(self) -> None:
        self._tell_wandb(lambda run: run.finish())

    def _tell_wandb(self, message: Callable[[Any], None]) -> None:
        """Observing never stops a run: at the first trouble wandb is left alone."""
        if self.wandb is None:
            return
        try:
            message(self.wandb)
        except Exception as error:
            log.warning("warning: wandb failed (%r) and gets no more; metrics.jsonl has everything", error)
            self.wandb = None

    def _warn_of_dead_experts(self, dead: int) -> None:
        if dead > self.warned_dead:
            log.warning("WARNING: %d experts have had no token for logging.dead_expert_steps steps", dead)
        self.warned_dead = dead

    def _write(self, values: dict[str, Any]) -> None:
        if dist.get_rank() != 0:
            return
        # NaN and infinity are not JSON; null is.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        scalars = {
            k: v for k, v in clean.items() if k != "step" and v is not None and not isinstance(v, list)
        }
        self._tell_wandb(lambda run: run.log(scalars, step=clean["step"]))

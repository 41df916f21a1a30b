"""DeepSpeed's AutoEP with Transformers' OLMoE, against this project's dispatch under the same DeepSpeed: the
same weights, tokens, ZeRO-2 and expert parallelism over two gloo ranks, a step of each in turn.

Both train on cross-entropy alone, since AutoEP's layer hands out no router logits for this model. Prints the
largest relative difference to one process's losses (Transformers and AdamW), and the ratio of step times.

    python -m benchmarks.autoep
"""

import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import run_ranks
from olmoe_train.config.choices import Precision, Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.train import LossConfig, ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.optim.build import build_optimizer
from olmoe_train.training.build import build_model
from olmoe_train.training.engine.deepspeed import ZeroEngine

RANKS, STEPS, WARM_UP = 2, 12, 3
MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_experts=16,
    num_experts_per_tok=4,
    eos_token_id=0,
)
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(dir="none", sequence_length=256),
    trainer=TrainerConfig(max_steps=STEPS, global_batch_size=8, micro_batch_size=4, precision=Precision.fp32),
    optimizer=AdamWConfig(lr=1e-3),
    loss=LossConfig(router_aux_loss_coef=0.0, router_z_loss_coef=0.0),
    parallel=ParallelConfig(Strategy.deepspeed, expert_parallel_size=2, zero_stage=2),
)
AUTOEP = {
    "enabled": True,
    "autoep_size": 2,
    "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "score_func": "softmax",
    "score_apply": "post",
    "route_norm": False,
}


def tokens(step: int) -> Tensor:
    """The global batch [8, 256]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(2, MODEL.vocab_size, (8, 256), generator=generator)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return build_optimizer(parameters, CONFIG.optimizer)


def alone(directory: Path) -> list[float]:
    """Losses of one process, and the weights that all start from."""
    from transformers import OlmoeForCausalLM as Reference

    model = OlmoeForCausalLM(olmoe_config(MODEL))
    model.save_pretrained(directory)
    reference = Reference.from_pretrained(directory)
    optimizer, losses = adamw(reference.parameters()), []
    for step in range(STEPS):
        loss = reference(input_ids=tokens(step), labels=tokens(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def autoep_engine(directory: Path) -> Any:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
    from transformers import OlmoeForCausalLM as Reference

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000},
        "zero_allow_untested_optimizer": True,
        "expert_parallel": AUTOEP,
        "steps_per_print": 10**9,
    }
    model = Reference.from_pretrained(directory)
    return deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        optimizer=lambda parameters: adamw(split({"params": list(parameters), "name": "all"})),
        config=config,
    )[0]


def race(directory: Path) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(losses over ranks, seconds) of each step, by contender."""
    device, rank = init_distributed("cpu"), dist.get_rank()
    cfg = replace(CONFIG, run_dir=str(directory), model=replace(MODEL, init_from=str(directory)))
    stored = build_model(cfg, build_mesh(cfg.parallel, device))
    own = ZeroEngine(stored, device, Path(cfg.run_dir), cfg.trainer, cfg.parallel, cfg.optimizer)
    autoep = autoep_engine(directory)
    losses: dict[str, list[float]] = {"own": [], "autoep": []}
    seconds: dict[str, list[float]] = {"own": [], "autoep": []}
    for step in range(STEPS):
        ids = tokens(step).chunk(RANKS)[rank]
        for name in ("own", "autoep") if step % 2 else ("autoep", "own"):
            dist.barrier()
            start = time.perf_counter()
            if name == "own":
                loss = own.model.training_forward(ids, ids).ce_sum / (8 * 255)
                own.backward(loss, last=True)
                own.step(lambda norm: norm.isnan())
            else:
                loss = autoep(input_ids=ids, labels=ids).loss
                autoep.backward(loss)
                autoep.step()
                loss = loss / RANKS
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses[name].append(total.item())
    return losses, seconds


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        expected = run_ranks(1, alone, directory)[0]
        losses, seconds = run_ranks(RANKS, race, directory)[0]
    for name, found in losses.items():
        worst = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        median = statistics.median(seconds[name][WARM_UP:])
        print(f"{name:<8}{1000 * median:8.0f} ms a step (median), losses within {worst:.1e} of one process's")
    ratios = [b / a for a, b in zip(seconds["own"][WARM_UP:], seconds["autoep"][WARM_UP:], strict=True)]
    print(f"autoep / own: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()

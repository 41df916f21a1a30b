"""What describes a run beside its configuration: code, command, layout, data, and size of the model."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import olmoe_train
from olmoe_train.config.choices import Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.mixture import mixture_components
from olmoe_train.data.stages import data_stages
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.planning.flops import parameter_counts

GIT_TIMEOUT_S = 5.0


def run_facts(parallel: ParallelConfig, model: OlmoeConfig, data: TrainingData) -> dict[str, Any]:
    """JSON values that the sinks show beside the configuration. The command may still hold secrets."""
    counts = parameter_counts(model)
    components, stages = mixture_components(data.cfg), data_stages(data.cfg)
    shares = [stage.requested_shares() for stage in stages]
    return {
        "code": code_version(),
        "command": shlex.join(sys.argv),
        "layout": layout(parallel, dist.get_world_size()),
        "data": {
            source.name: {
                # With stages: in each of them.
                "share": [share.get(source.name, 0.0) for share in shares]
                if data.cfg.stages
                else shares[0][source.name],
                "tokens": data.manifests[source.name].train.tokens,
            }
            for source in components
        },
        "parameters": {"total": counts.total, "active": counts.active},
    }


def code_version() -> dict[str, Any]:
    """Version of this package and of torch; in a git checkout of the package also its commit.

    `dirty` says whether files differ from the commit.
    """
    versions = {"olmoe_train": olmoe_train.__version__, "torch": torch.__version__}
    root = Path(olmoe_train.__file__).parent
    # Of an installed package, a checkout that happens to contain the environment says nothing.
    if _git(root, "ls-files", "--error-unmatch", "__init__.py") is None:
        return versions
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return versions | {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or is not installed."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def layout(parallel: ParallelConfig, ranks: int) -> dict[str, Any]:
    """Ranks per dimension, as in distributed/mesh.py."""
    copies = ranks if parallel.strategy is Strategy.ddp else parallel.replicate_size
    return {
        "strategy": parallel.strategy.value,
        "ranks": ranks,
        "replicate": copies,
        "shard": ranks // copies,
        "expert": parallel.expert_parallel_size,
    }

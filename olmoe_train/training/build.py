"""Builds what a run needs from its configuration."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from olmoe_train.checkpoint.convert.stored_model import load_into
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.loader import build_train_loader
from olmoe_train.distributed.materialize import initialise
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.distributed.parallelize import parallelize
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.training.batch import Batch
from olmoe_train.training.state import Progress


def build_model(cfg: TrainConfig, mesh: Mesh) -> OlmoeForCausalLM:
    """The model in its layout on this rank, with its initial weights. Nothing is allocated before it is
    sharded."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(olmoe_config(cfg.model))
    model.set_experts_backend(cfg.model.experts_backend.value)
    model = parallelize(model, cfg, mesh)
    initialise(model, mesh.device, cfg.seed)
    if cfg.model.init_from is not None:
        load_into(model, cfg.model.init_from, cfg.model.trust_pickle)
    return model


def train_batches(cfg: TrainConfig, progress: Progress) -> Iterator[Batch]:
    return iter(
        build_train_loader(
            cfg.data,
            cfg.seed,
            start_sample=progress.samples,
            global_batch_size=cfg.trainer.global_batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            micro_batch_size=cfg.trainer.micro_batch_size,
        )
    )

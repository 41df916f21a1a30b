"""Checks of `adapter` together with the model, the layout and the losses."""

from olmoe_train.config.adapter import LoraConfig, quantizes_base
from olmoe_train.config.choices import AdapterTarget, ExpertsBackend, RouterTraining, Strategy
from olmoe_train.config.optimizer import OrthogonalizingConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.model.adapters.nf4 import BLOCK


def adapter_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is wrong with the adapter of a run, one message per error."""
    adapter, model = cfg.adapter, cfg.model
    if not isinstance(adapter, LoraConfig):
        return []
    errors = []
    if model.init_from is None:
        errors.append(
            f"adapter={adapter.name}: an adapter is trained on a model, and there is none; set "
            "model.init_from to its HF directory, or adapter=none"
        )
    if isinstance(cfg.optimizer, OrthogonalizingConfig):
        errors.append(
            f"optimizer={cfg.optimizer.name} with adapter={adapter.name}: an adapted weight moves by the "
            "product of two low-rank matrices, and orthogonalizing each of them does not orthogonalize it; "
            "set optimizer=adamw, or adapter=none"
        )
    shared = [
        target.value
        for target in adapter.targets
        if target in (AdapterTarget.lm_head, AdapterTarget.embeddings)
    ]
    if model.tie_word_embeddings and shared:
        errors.append(
            f"adapter.targets: {' and '.join(shared)} cannot have an adapter, because this model's head and "
            "embedding are one weight (model.tie_word_embeddings=true)"
        )
    of_experts = AdapterTarget.experts in adapter.targets
    if of_experts and model.experts_backend is ExpertsBackend.sonicmoe:
        errors.append(
            "model.experts_backend=sonicmoe: its kernels know no adapter; set model.experts_backend=auto, or "
            "leave experts out of adapter.targets"
        )
    return [*errors, *_nf4_errors(cfg), *(_sharding_errors(cfg, adapter, world_size) if of_experts else [])]


def _nf4_errors(cfg: TrainConfig) -> list[str]:
    if not quantizes_base(cfg.adapter):
        return []
    hidden, width = cfg.model.hidden_size, cfg.model.intermediate_size
    matrices = {
        "model.hidden_size x model.intermediate_size": hidden * width,
        "model.hidden_size squared": hidden**2,
    }
    return [
        f"adapter.quantize_base=nf4: {name}={elements} must be a multiple of {BLOCK}, the elements that "
        "share a scale; set adapter.quantize_base=none"
        for name, elements in matrices.items()
        if elements % BLOCK
    ]


def _sharding_errors(cfg: TrainConfig, adapter: LoraConfig, world_size: int) -> list[str]:
    """FSDP2 shards lora_A of expert-parallel experts along its rank or its width (distributed/fsdp.py)."""
    parallel = cfg.parallel
    if parallel.strategy is not Strategy.fsdp or parallel.expert_parallel_size <= 1:
        return []
    shards = world_size // max(1, parallel.replicate_size) // parallel.expert_parallel_size
    if shards < 1 or adapter.rank % shards == 0 or cfg.model.intermediate_size % shards == 0:
        return []
    nearest = max(1, round(adapter.rank / shards)) * shards
    width = cfg.model.intermediate_size
    return [
        (
            f"adapter.rank={adapter.rank}: must be a multiple of the {shards} ranks that hold the same "
            f"experts, as model.intermediate_size={width} is not; the nearest is {nearest}"
        )
    ]


def adapter_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about keys of a valid config that have no effect with this adapter, or less than expected."""
    adapter, warnings = cfg.adapter, []
    if not isinstance(adapter, LoraConfig):
        return []
    if adapter.router is RouterTraining.frozen and cfg.model.num_experts > 1:
        warnings += [
            f"loss.{name} has no effect: the routers are frozen (adapter.router=frozen), and the router "
            "losses are only reported"
            for name in ("router_aux_loss_coef", "router_z_loss_coef")
            if getattr(cfg.loss, name) != 0
        ]
    if quantizes_base(adapter) and AdapterTarget.experts not in adapter.targets:
        warnings.append(
            "adapter.quantize_base=nf4 quantizes only the weights that adapter.targets names: without "
            "experts most of the model stays in 16 or 32 bits"
        )
    if adapter.dropout and adapter.targets == [AdapterTarget.embeddings]:
        warnings.append("adapter.dropout has no effect: it does not apply to embeddings, the only target")
    return warnings

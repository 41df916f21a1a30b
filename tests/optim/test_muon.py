"""Muon: its update by definition, roles of parameters, weight decay, and runs that stop and continue."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from olmoe_train.checkpoint.convert.stored_model import load_stored_model
from olmoe_train.config.adapter import LoraConfig
from olmoe_train.config.choices import ActivationCheckpointing, MuonScale, Precision, Strategy, Weights
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.optimizer import AdamWConfig, MuonConfig, NorMuonConfig, OptimizerConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.evaluation.perplexity import evaluate_data
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter
from olmoe_train.model.adapters.spec import TARGETS, AdapterSpec
from olmoe_train.model.roles import ROLE_NAMES, ParameterRole, role_of
from olmoe_train.optim import muon
from olmoe_train.optim.average import keep_average
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.muon import orthogonalize, update_scale
from olmoe_train.optim.roles import groups_table, parameter_groups
from olmoe_train.optim.skip_step import step_unless
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.live_memory import LiveBytes
from olmoe_train.planning.memory import MicroBatch, rank_memory
from olmoe_train.planning.memory_optimizer import update_bytes
from olmoe_train.training.preflight.adapter import adapter_errors
from olmoe_train.training.preflight.parallel import parallel_errors
from olmoe_train.utils.errors import UserError
from tests.support.faults import config, records, run, same, saved_tensors, saved_weights, write_data
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES

LR, DECAY, EMA_DECAY = 0.01, 0.1, 0.75


def make_steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def matrix_group(weight: nn.Parameter, matrices_per_row: int = 1, rule: str = "muon") -> list[dict[str, Any]]:
    return [{"params": [weight], "rule": rule, "matrices_per_row": [matrices_per_row]}]


def by_definition(weight: Tensor, gradients: list[Tensor], cfg: OptimizerConfig) -> Tensor:
    """One matrix after one update per gradient, in fp64."""
    weight, total = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    means = torch.zeros(len(weight), 1, dtype=torch.float64)
    for gradient in gradients:
        total = 0.95 * total + gradient.double()
        x = gradient.double() + 0.95 * total
        x = x / x.square().sum().sqrt()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        if isinstance(cfg, NorMuonConfig):
            means = 0.95 * means + 0.05 * (x * x).mean(1, keepdim=True)
            x = x / (means.sqrt() + 1e-8)
            x = 0.2 * x / (x * x).mean().sqrt()
        else:
            x = 0.2 * math.sqrt(max(x.shape)) * x
        weight = weight - LR * (x + DECAY * weight)
    return weight


@pytest.mark.parametrize("at_once", [1, 2, 2**25])
@pytest.mark.parametrize("kind", [MuonConfig, NorMuonConfig])
def test_stacked_experts_are_a_loop_over_matrices(
    kind: type[MuonConfig | NorMuonConfig], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gate_up [3, 2 x 6, 8] is 6 matrices of [6, 8]; down [3, 8, 6] is 3. at_once: experts per product."""
    monkeypatch.setattr(muon, "MUON_ELEMENTS", at_once * 12 * 8)
    torch.manual_seed(0)
    for shape, per_row in (((3, 12, 8), 2), ((3, 8, 6), 1), ((8, 6), 1)):
        first, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
        weight = nn.Parameter(first.clone())
        cfg = kind(lr=LR)
        optimizer = build_optimizer(matrix_group(weight, per_row, cfg.name), cfg)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        rows = shape[-2] // per_row
        matrices = [tensor.reshape(-1, rows, shape[-1]) for tensor in (first, *gradients)]
        expected = torch.stack([by_definition(w, g, cfg) for w, *g in zip(*matrices, strict=True)])
        assert torch.allclose(weight.double().view_as(expected), expected, rtol=0, atol=1e-6)
        assert tuple(optimizer.state[weight]) == cfg.state_of(ParameterRole.expert_matrix)


def test_gate_and_up_are_orthogonalized_apart() -> None:
    """A gate whose gradient is a thousand times that of up: together, up would hardly move."""
    torch.manual_seed(0)
    gradient = torch.cat([1000 * torch.randn(1, 6, 8), torch.randn(1, 6, 8)], dim=1)
    for per_row, up_moves in ((2, True), (1, False)):
        weight = nn.Parameter(torch.zeros(1, 12, 8))
        weight.grad = gradient.clone()
        build_optimizer(matrix_group(weight, per_row), MuonConfig(lr=LR)).step()
        up = torch.linalg.svdvals(weight[0, 6:].detach()) / (LR * 0.2 * math.sqrt(8))
        assert (bool(up.min() > 0.67)) is up_moves


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    """Of matrices with singular values from 0.02 to 1 and any norm. Five iterations with these coefficients
    send (0.002, 1) to (0.68, 1.21). The root mean square of the scaled update is near 0.2, that of AdamW."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(4, *shape), full_matrices=False)
    planted = left * torch.linspace(0.02, 1, min(shape)) @ right
    update = orthogonalize(planted * torch.tensor([1e-3, 1.0, 30.0, 1e4]).view(4, 1, 1), 5)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.68
    assert values.max() < 1.21
    rms = update.square().mean((-2, -1)).sqrt() * update_scale(*shape, MuonScale.match_rms)
    assert ((rms > 0.7 * 0.2) & (rms < 1.3 * 0.2)).all()
    spectral = update_scale(*shape, MuonScale.spectral)
    assert spectral == pytest.approx(math.sqrt(shape[0] / shape[1]))
    assert torch.equal(orthogonalize(torch.zeros(1, *shape), 5), torch.zeros(1, *shape))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_matrix_moves_as_with_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon iterates in bf16 everywhere, and rounds elsewhere: 2% of the way."""
    monkeypatch.setattr(muon, "newton_schulz_dtype", lambda device: torch.bfloat16)
    torch.manual_seed(0)
    first = torch.randn(shape)
    ours, theirs = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    make_steps(build_optimizer(matrix_group(ours), MuonConfig(lr=LR)), [ours], 1, 3)
    reference = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    make_steps(reference, [theirs], 1, 3)
    assert (ours - theirs).norm() < 0.02 * (theirs - first).norm()


def tiny(**sizes: Any) -> OlmoeForCausalLM:
    with torch.device("meta"):
        return OlmoeForCausalLM(OlmoeConfig(**SIZES | sizes))


def test_every_parameter_is_in_the_group_of_its_role() -> None:
    cfg = MuonConfig(lr=1e-3, adamw_lr=2e-4, no_decay=[ParameterRole.norm, ParameterRole.embedding])
    model = tiny()
    groups = parameter_groups(model, cfg)
    ours = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in ours} == {id(p) for p in model.parameters()}
    assert len(ours) == len(list(model.parameters()))
    # 3 layers: q, k, v and o 4 x 32^2; 8 experts of 3 x 16 x 32; routers 8 x 32; four norms and a final one.
    assert [line.split() for line in groups_table(groups)] == [
        ["role", "parameters", "tensors", "rule", "lr", "weight", "decay"],
        ["matrix", "12,288", "12", "muon", "0.001", "0.1"],
        ["expert_matrix", "36,864", "6", "muon", "0.001", "0.1"],
        ["router", "768", "3", "adamw", "0.0002", "0.1"],
        ["embedding", "3,104", "1", "adamw", "0.0002", "0"],
        ["head", "3,104", "1", "adamw", "0.0002", "0.1"],
        ["norm", "416", "13", "adamw", "0.0002", "0"],
    ]
    assert groups[1]["matrices_per_row"] == [2, 1] * 3
    tied = parameter_groups(tiny(tie_word_embeddings=True), AdamWConfig())
    assert [(group["role"], len(group["params"])) for group in tied][2:] == [
        ("router", 3),
        ("embedding", 1),
        ("norm", 13),
    ]
    biased = parameter_groups(tiny(attention_bias=True), AdamWConfig())
    assert {group["role"]: len(group["params"]) for group in biased}["bias"] == 12


def test_an_adapter_is_a_role_of_its_own() -> None:
    model = tiny()
    add_adapter(model, AdapterSpec(rank=2, alpha=2.0, targets=TARGETS, dora=True))
    groups = parameter_groups(model, AdamWConfig())
    # In each of 3 layers, 4 projections and 2 weights of the experts, head and embedding: A, B and magnitude.
    assert [(group["role"], len(group["params"])) for group in groups] == [("adapter", 3 * (3 * 6 + 2))]


def test_a_parameter_with_no_role_or_two_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.model.layers[1].register_parameter("extra", nn.Parameter(torch.zeros(2)))
    with pytest.raises(UserError, match=r"parameter model\.layers\.1\.extra: .* and has none; make"):
        parameter_groups(model, AdamWConfig())
    monkeypatch.setitem(ROLE_NAMES, ParameterRole.head, r"(lm_head|gate)\.weight$")
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.gate\.weight: .* has router and head"):
        parameter_groups(tiny(), AdamWConfig())


@pytest.mark.parametrize("kind", [AdamWConfig, MuonConfig])
def test_roles_without_weight_decay_keep_their_values(kind: type[OptimizerConfig]) -> None:
    """Gradients of 0 change nothing but by weight decay, 1 - 0.1 x 0.5."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
    kept = [ParameterRole.norm, ParameterRole.matrix]
    cfg = kind(lr=0.1, weight_decay=0.5, no_decay=kept)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(parameter_groups(model, cfg), cfg).step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if role_of(name) in kept else 0.95
        assert torch.allclose(parameter, factor * before[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize("cfg", [MuonConfig(lr=LR), NorMuonConfig(lr=LR)])
def test_a_skipped_step_changes_no_bit(cfg: OptimizerConfig) -> None:
    """Of weights and of both kinds of state, and the host reads nothing: `skip` is on the device."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
    optimizer = build_optimizer(parameter_groups(model, cfg), cfg)
    keep_average(optimizer, EMA_DECAY)
    weights = list(model.parameters())

    def state() -> list[Tensor]:
        moments = [value for weight in weights for value in optimizer.state[weight].values()]
        return [tensor.detach().clone() for tensor in (*weights, *moments)]

    for weight in weights:
        weight.grad = torch.randn_like(weight)
    step_unless(optimizer, torch.tensor(False))
    before = state()
    for weight in weights:
        weight.grad = torch.full_like(weight, math.nan)
    step_unless(optimizer, torch.tensor(True))
    assert all(map(torch.equal, before, state()))
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    step_unless(optimizer, torch.tensor(False))
    assert not any(map(torch.equal, before, state()))
    with FakeTensorMode(allow_non_fake_inputs=True):  # raises where the host reads a value
        weight = nn.Parameter(torch.empty(4, 6))
        weight.grad = torch.empty(4, 6)
        optimizer = build_optimizer(matrix_group(weight, rule=cfg.name), cfg)
        keep_average(optimizer, EMA_DECAY)
        step_unless(optimizer, torch.tensor(True))


def test_values_out_of_range_are_named() -> None:
    assert MuonConfig().errors() == []
    assert NorMuonConfig(beta2=1.0, eps=0.0).errors() == [
        "optimizer.beta2=1.0: must be in [0, 1)",
        "optimizer.eps=0.0: must be positive",
    ]
    wrong = MuonConfig(momentum=1.0, ns_steps=0, adamw_lr=0.0, adamw_betas=(0.9, 1.0), adamw_eps=-1.0)
    assert wrong.errors() == [
        "optimizer.momentum=1.0: must be in [0, 1)",
        "optimizer.ns_steps=0: must be positive",
        "optimizer.adamw_lr=0.0: must be positive",
        "optimizer.adamw_betas=[0.9, 1.0]: each must be in [0, 1)",
        "optimizer.adamw_eps=-1.0: must not be negative",
    ]


@pytest.mark.parametrize("kind", [MuonConfig, NorMuonConfig])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_refuses_it_with_the_reason(stage: int, kind: type[MuonConfig | NorMuonConfig]) -> None:
    cfg = TrainConfig(
        optimizer=kind(no_decay=[ParameterRole.norm]),
        parallel=ParallelConfig(strategy=Strategy.deepspeed, zero_stage=stage),
        trainer=TrainerConfig(global_batch_size=8, micro_batch_size=8, precision=Precision.fp32),
    )
    refused, decay = parallel_errors(cfg, world_size=1)
    assert refused.startswith(f"optimizer={kind.name} with parallel.zero_stage={stage}: ")
    reason = ("fused AdamW alone", "ends inside matrices", "ends inside matrices", "part of each parameter")
    assert reason[stage] in refused
    assert decay.startswith("optimizer.no_decay=[norm]: with parallel.strategy=deepspeed")


def test_an_adapter_refuses_it_with_the_reason() -> None:
    cfg = TrainConfig(optimizer=MuonConfig(), adapter=LoraConfig(), model=ModelConfig(init_from="base"))
    [error] = adapter_errors(cfg, world_size=1)
    assert error.startswith("optimizer=muon with adapter=lora: ")


@pytest.mark.parametrize(
    ("cfg", "rows"), [(MuonConfig(), 0), (NorMuonConfig(), 12 * 32 + 24 * (2 * 16 + 32))]
)
def test_a_plan_counts_one_moment_of_matrices_and_two_of_the_rest(cfg: OptimizerConfig, rows: int) -> None:
    batch = MicroBatch(1, 16, Precision.fp32, ActivationCheckpointing.none)
    arguments = (OlmoeConfig(**SIZES), ParallelLayout(Strategy.fsdp, 1), batch, None, cfg)
    memory, averaged = rank_memory(*arguments), rank_memory(*arguments, averaged=True)
    matrices, others = 12_288 + 36_864, 768 + 2 * 3_104 + 416
    assert memory.gradients == 4 * (matrices + others)
    assert memory.optimizer == 4 * (matrices + rows + 2 * others)
    assert averaged == replace(memory, optimizer=memory.optimizer + memory.gradients)


@pytest.mark.parametrize("cfg", [MuonConfig(), NorMuonConfig()])
@pytest.mark.parametrize("sizes", [{}, {"intermediate_size": 64, "num_experts": 4}])
def test_a_plan_knows_what_the_update_allocates(sizes: dict[str, Any], cfg: OptimizerConfig) -> None:
    """Of gate and up of all experts, or of the projections of all layers; less where no matrix is cut."""
    shapes = OlmoeConfig(**SIZES | sizes)
    model = OlmoeForCausalLM(shapes)
    optimizer = build_optimizer(parameter_groups(model, cfg), cfg)
    make_steps(optimizer, list(model.parameters()), 0, 1)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    with LiveBytes([*model.parameters(), *gradients, *moments]) as live:
        held = live.now()
        optimizer.step()
    planned = update_bytes(shapes, ParallelLayout(Strategy.fsdp, 1), cfg)
    assert 0.6 * planned < live.peak - held <= planned


def resume_in_two_layouts(data: Path, directory: Path) -> None:
    """On each rank: a run of four steps, one that stops after two and goes on, and one that goes on in
    another layout. All keep an average of the weights. The state of NorMuon has that of Muon, and more."""

    def run_to(step: int, name: str, experts: int) -> None:
        trainer = {"max_steps": 4, "stop_at_step": step, "ema_decay": EMA_DECAY}
        parallel = ParallelConfig(expert_parallel_size=experts)
        run(
            config(
                data, directory / name, optimizer=NorMuonConfig(lr=1e-2), trainer=trainer, parallel=parallel
            )
        )

    run_to(4, "whole", 2)
    run_to(2, "parts", 2)
    if dist.get_rank() == 0:
        shutil.copytree(directory / "parts", directory / "elsewhere")
    dist.barrier()
    run_to(4, "parts", 2)
    run_to(4, "elsewhere", 1)


@pytest.mark.ranks
def test_two_ranks_resume_bit_for_bit_and_in_another_layout(tmp_path: Path) -> None:
    run_ranks(2, resume_in_two_layouts, write_data(tmp_path / "data"), tmp_path)
    whole, parts = (saved_tensors(tmp_path / name, 4) for name in ("whole", "parts"))
    for key in ("momentum_buffer", "row_second_moment"):
        assert sum(f"optim.{key}." in name for name in whole) == 2 * 2 * 6
    assert sum("optim.ema." in name for name in whole) == sum("s/model." in name for name in whole)
    assert same(whole, parts)
    for which in Weights:
        expected, found = (saved_weights(tmp_path / name, 4, which) for name in ("whole", "elsewhere"))
        before = saved_weights(tmp_path / "parts", 2, which)
        for name, weight in expected.items():
            assert (found[name] - weight).norm() < 1e-5 * weight.norm(), name
            assert (before[name] - weight).norm() > 1e-3 * weight.norm(), name
    assert_averages(tmp_path / "whole", config(tmp_path / "data", tmp_path / "whole"))


def assert_averages(run_dir: Path, cfg: TrainConfig) -> None:
    """The averages of the steps are those of their definition, and the run logged the loss of the last."""
    for step in (2, 3, 4):
        average, weights = saved_weights(run_dir, step, Weights.ema), saved_weights(run_dir, step)
        for name, before in saved_weights(run_dir, step - 1, Weights.ema).items():
            expected = EMA_DECAY * before + (1 - EMA_DECAY) * weights[name]
            assert torch.allclose(average[name], expected, rtol=1e-6, atol=1e-7), (step, name)
    [logged] = records(run_dir, "eval/validation/ema_loss")
    for which, key in ((Weights.ema, "ema_loss"), (Weights.weights, "loss")):
        model, _ = load_stored_model(str(run_dir), torch.device("cpu"), which=which)
        of_model = evaluate_data(model, cfg.data, cfg.evaluation, torch.device("cpu"))
        assert logged[f"eval/validation/{key}"] == pytest.approx(of_model["validation"].loss, rel=1e-6)
    assert logged["eval/validation/ema_loss"] != pytest.approx(logged["eval/validation/loss"], rel=1e-3)

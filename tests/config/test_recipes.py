"""The released recipes, hyper-parameter by hyper-parameter, against the paper (arXiv 2409.02060), and the
commands, logs and code of the released runs."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from olmoe_train.config import compose
from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import (
    ActivationCheckpointing,
    BalanceScope,
    Convention,
    Packing,
    Precision,
    PreferenceKind,
    Reference,
    Schedule,
)
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.objective import GrpoConfig, NextTokenConfig, PreferenceConfig
from olmoe_train.config.optimizer import AdamWConfig, RMSpropConfig
from olmoe_train.config.reference import config_directory
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.manifest import Manifest, Split
from olmoe_train.data.stages import data_stages
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.optim.schedule import Schedule as LearningRate
from olmoe_train.planning.duration import total_steps
from olmoe_train.planning.flops import parameter_counts, train_flops_per_token
from olmoe_train.training.build import build_schedule
from olmoe_train.training.objectives.rewards import build_reward
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils.errors import UserError


@cache  # every composition takes some 0.2 s
def recipe(name: str, *overrides: str) -> TrainConfig:
    return compose(f"experiment={name}", "data.dir=somewhere", *overrides)


@pytest.mark.parametrize("name", ["olmoe_1b_7b_0924", "olmoe_1b_7b_0924_anneal"])
def test_architecture_as_released(name: str) -> None:
    # Table 10 (appendix B) and allenai/OLMoE-1B-7B-0924's config.json.
    model = recipe(name).model
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (2048, 16, 16)
    assert (model.num_experts, model.num_experts_per_tok, model.intermediate_size) == (64, 8, 1024)
    assert (model.vocab_size, model.max_position_embeddings) == (50304, 4096)
    assert (model.pad_token_id, model.eos_token_id) == (1, 50279)
    assert (model.initializer_range, model.rms_norm_eps) == (0.02, 1e-5)
    assert model.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert model.hidden_act == "silu"
    assert model.clip_qkv is None
    switches = [model.norm_topk_prob, model.tie_word_embeddings, model.attention_bias]
    assert switches == [False, False, False]
    assert model.attention_dropout == 0


def test_pretraining_as_released() -> None:
    cfg = recipe("olmoe_1b_7b_0924")
    assert cfg.trainer.global_batch_size == 1024
    assert cfg.data.sequence_length == 4096
    assert (cfg.data.packing, cfg.data.mask_documents) == (Packing.concat, False)
    assert cfg.data.repetition_filter
    assert cfg.trainer.precision is Precision.bf16
    assert cfg.optimizer.lr == 4e-4
    assert isinstance(cfg.optimizer, AdamWConfig)
    assert tuple(cfg.optimizer.betas) == (0.9, 0.95)
    assert (cfg.optimizer.eps, cfg.optimizer.weight_decay, cfg.optimizer.max_grad_norm) == (1e-8, 0.1, 1.0)
    assert (cfg.loss.router_aux_loss_coef, cfg.loss.router_z_loss_coef) == (0.01, 0.001)
    assert cfg.loss.convention is Convention.olmoe_0924
    assert cfg.balancing == AuxiliaryLossConfig(scope=BalanceScope.micro_batch)
    assert cfg.scheduler.kind is Schedule.cosine
    # 10,485,760,000 tokens / (1024 x 4096) = 2500 steps of warm-up; 5e12 / 4,194,304 = 1,192,092.9 of decay.
    schedule = schedule_of(cfg)
    assert (schedule.warmup_end, round(schedule.decay_end, 1)) == (2500.0, 1_192_092.9)
    rates = [cfg.optimizer.lr * schedule.multiplier(step) for step in (0, 2500, 1_192_093)]
    assert rates == pytest.approx([4e-5, 4e-4, 4e-5])
    assert cfg.trainer.max_tokens == 5_133_000_000_000 - 100_000_000_000


def schedule_of(cfg: TrainConfig) -> LearningRate:
    return build_schedule(cfg, total_steps(cfg.trainer, cfg.data.sequence_length))


def test_annealing_as_released() -> None:
    cfg = recipe("olmoe_1b_7b_0924_anneal")
    assert cfg.optimizer.lr == 4e-5
    assert cfg.scheduler.kind is Schedule.linear
    schedule = schedule_of(cfg)
    # 100e9 tokens / 4,194,304 = 23,841.9 steps.
    last_step = total_steps(cfg.trainer, cfg.data.sequence_length)
    assert (schedule.warmup_end, round(schedule.decay_end, 1), last_step) == (0.0, 23_841.9, 23_842)
    rates = [cfg.optimizer.lr * schedule.multiplier(step) for step in (0, 23_842)]
    assert rates == pytest.approx([4e-5, 0.0])
    assert cfg.seed != recipe("olmoe_1b_7b_0924").seed, "the mix is reshuffled for annealing"


def test_the_anneal_of_0125_is_a_stage_and_a_branch() -> None:
    # Released anneal configs: from step 1,200,000, 4e-5 to 0 over 100e9 tokens. Shares: table 15, appendix I.
    stable, anneal = recipe("olmoe_1b_7b_0125"), recipe("olmoe_1b_7b_0125_anneal")
    assert stable.data == anneal.data
    first, second = data_stages(stable.data)
    assert first.until == second.first == 1_200_000 * 1024
    shares = [round(100 * share, 1) for share in second.requested_shares().values()]
    assert shares == [50.2, 16.7, 9.5, 3.6, 2.5, 17.5]
    cosine, linear = schedule_of(stable), schedule_of(anneal)
    assert stable.trainer.stop_at_step == 1_200_000
    for step, rate in ((2500, 4e-4), (1_200_000, 4e-5)):
        assert stable.optimizer.lr * cosine.multiplier(step) == pytest.approx(rate)
    assert linear.decay_start == 1_200_000
    rates = [anneal.optimizer.lr * linear.multiplier(step) for step in (1_200_000, 1_211_921, 1_223_842)]
    assert rates == pytest.approx([4e-5, 2e-5, 0.0], rel=1e-4)
    changed = {
        key for key, value in vars(anneal.optimizer).items() if value != getattr(stable.optimizer, key)
    }
    assert [f"optimizer.{key}" for key in changed] == anneal.checkpoint.allow_changes


@pytest.mark.parametrize(
    "name", ["olmoe_sft", "olmoe_sft_0125", "olmoe_dpo", "olmoe_dpo_0125", "olmoe_kto", "olmoe_lora"]
)
def test_adaptation_needs_a_model(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.init_from=GIVE_AN_HF_DIRECTORY: neither an HF dir"):
        recipe(name)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`model.init_from` of a directory with the configuration of the released models."""
    directory = tmp_path_factory.mktemp("released")
    OlmoeConfig(intermediate_size=1024).save_pretrained(directory)
    return f"model.init_from={directory}"


def linear_to_zero(cfg: TrainConfig, steps: int, warmup_steps: float) -> None:
    """Assert that the rate of a run of `steps` rises from 0 to its peak, then falls linearly to 0."""
    schedule = build_schedule(cfg, steps)
    assert cfg.scheduler.kind is Schedule.linear
    assert (schedule.warmup_end, schedule.decay_end) == pytest.approx((warmup_steps, steps))
    half = steps // 2
    rates = [schedule.multiplier(step) for step in (0, half, steps)]
    assert rates == pytest.approx(
        [0.0 if warmup_steps else 1.0, (steps - half) / (steps - warmup_steps), 0.0]
    )


def as_composed(cfg: TrainConfig) -> tuple[float, float]:
    """torch's default betas in the type that Hydra composes, after a comparison of their values."""
    assert isinstance(cfg.optimizer, AdamWConfig)
    assert tuple(cfg.optimizer.betas) == (0.9, 0.999)
    return cfg.optimizer.betas


def no_router_losses(cfg: TrainConfig) -> bool:
    """arXiv 2409.02060, section 4.3 and table 7: adapted without load-balancing loss. The log of SFT has no
    auxiliary loss, the first loss of DPO's log is ln 2, and olmoe_0125.sh has no flag for one."""
    return (cfg.loss.router_aux_loss_coef, cfg.loss.router_z_loss_coef) == (0.0, 0.0)


def test_fine_tuning_as_released(released: str) -> None:
    """OLMoE-1B-7B-0924-SFT: the command of github.com/allenai/OLMoE, and logs/olmoe-sft-logs.txt there."""
    cfg = recipe("olmoe_sft", released)
    # README; open-instruct's finetune.py leaves betas and eps at torch's defaults; clipping of the log.
    assert cfg.optimizer == AdamWConfig(
        lr=2e-5, weight_decay=0.0, max_grad_norm=1.0, betas=as_composed(cfg), eps=1e-8
    )
    linear_to_zero(cfg, 9_500, 285)  # log
    assert cfg.objective == NextTokenConfig()
    assert no_router_losses(cfg)
    assert cfg.trainer.precision is Precision.bf16  # log
    assert (cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.trainer.max_tokens) == (2, None, None)
    # --num_processes 8 --per_device_train_batch_size 2 --gradient_accumulation_steps 8
    assert (cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size) == (8 * 2 * 8, 2)
    assert (cfg.data.sequence_length, cfg.data.packing) == (4096, Packing.best_fit)
    assert cfg.data.mask_documents
    assert olmoe_config(cfg.model).to_dict() == olmoe_config(recipe("olmoe_1b_7b_0924").model).to_dict()


def test_fine_tuning_of_0125(released: str) -> None:
    """olmoe_0125.sh and olmo2_1124_7b_sft.yaml of open-instruct: as 0924, except for learning rate and seed.
    They sweep 2e-5 and 1.75e-5; the last stage's path names 1.75e-5 and seed 7."""
    cfg, of_0924 = recipe("olmoe_sft_0125", released), recipe("olmoe_sft", released)
    assert (cfg.optimizer.lr, cfg.seed, cfg.run_dir) == (1.75e-5, 7, "runs/olmoe_sft_0125")
    # olmo2_1124_7b_sft.yaml: linear, warm-up 0.03, no decay, 2 epochs, 4096 tokens, batches of 128.
    linear_to_zero(cfg, 1_000, 30)
    assert cfg.optimizer.weight_decay == 0.0
    assert (cfg.trainer.max_epochs, cfg.trainer.global_batch_size) == (2, 128)
    assert cfg.data.sequence_length == 4096
    others = replace(cfg, optimizer=of_0924.optimizer, seed=of_0924.seed, run_dir=of_0924.run_dir)
    assert others == of_0924
    assert replace(cfg.optimizer, lr=of_0924.optimizer.lr) == of_0924.optimizer


def test_dpo_as_released(released: str) -> None:
    """OLMoE-1B-7B-0924-Instruct: the command of github.com/allenai/OLMoE, logs/olmoe-dpo-logs.txt there, and
    dpo_tune.py of open-instruct."""
    cfg = recipe("olmoe_dpo", released)
    # README: sigmoid loss of summed log-probabilities, beta 0.1. The log: a reference.
    assert cfg.objective == PreferenceConfig(
        kind=PreferenceKind.dpo, beta=0.1, label_smoothing=0.0, sft_weight=0.0, reference=Reference.cached
    )
    # README: 5e-7, no decay; betas and eps are torch's defaults; clipping of the log.
    assert cfg.optimizer == AdamWConfig(
        lr=5e-7, weight_decay=0.0, max_grad_norm=1.0, betas=as_composed(cfg), eps=1e-8
    )
    linear_to_zero(cfg, 5_712, 571.2)  # log: 571 of 5,712 steps
    assert (cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.trainer.stop_at_step) == (3, None, None)
    # --num_processes 8 --per_device_train_batch_size 1 --gradient_accumulation_steps 4; the log: 32 x 1 x 1
    assert (cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size) == (8 * 1 * 4, 1)
    # 60,917 pairs of the log in batches of 32 are 1,904 steps an epoch.
    assert 3 * -(-60_917 // cfg.trainer.global_batch_size) == 5_712
    assert cfg.trainer.precision is Precision.bf16
    assert cfg.trainer.activation_checkpointing is ActivationCheckpointing.full
    assert (cfg.data.sequence_length, cfg.data.packing, cfg.data.mask_documents) == (
        4096,
        Packing.best_fit,
        True,
    )
    assert no_router_losses(cfg)


def test_kto_as_released(released: str) -> None:
    """The KTO model of arXiv 2409.02060: the command of github.com/allenai/OLMoE, kto.py and
    config_8gpusdsz2_m7.yml of github.com/Muennighoff/kto, and the defaults of trl 0.9.6."""
    cfg = recipe("olmoe_kto", released)
    # The command: beta 0.1. trl: weights of 1.
    assert cfg.objective == PreferenceConfig(
        kind=PreferenceKind.kto,
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        reference=Reference.cached,
    )
    # The command: rmsprop, 5e-7. torch: alpha, eps, no momentum. Transformers: no decay, clipping at 1.
    assert cfg.optimizer == RMSpropConfig(
        lr=5e-7, weight_decay=0.0, max_grad_norm=1.0, alpha=0.99, eps=1e-8, momentum=0.0
    )
    # The command: 3 epochs. The paper: the model of step 5,000, after 1.3 epochs.
    trainer = cfg.trainer
    assert (trainer.max_epochs, trainer.max_steps, trainer.stop_at_step) == (3, None, 5_000)
    # Inferred: Transformers' default schedule over 3 epochs of 5,000 / 1.3 = 3,846 steps. 57% are left then.
    linear_to_zero(cfg, 11_538, 0)
    assert build_schedule(cfg, 11_538).multiplier(5_000) == pytest.approx(0.5667, abs=1e-4)
    assert (trainer.global_batch_size, trainer.micro_batch_size) == (8 * 4 * 1, 4)  # 8 GPUs, no accumulation
    assert trainer.precision is Precision.bf16
    # kto_trainer.py of trl 0.9.6 falls back to 512 without max_length.
    assert (cfg.data.sequence_length, cfg.data.packing, cfg.data.mask_documents) == (
        512,
        Packing.best_fit,
        True,
    )
    assert no_router_losses(cfg)


def test_dpo_of_0125(released: str) -> None:
    """docs/archived_dev_scripts/olmoe_0125.sh of open-instruct (dpo_tune_cache.py)."""
    cfg = recipe("olmoe_dpo_0125", released)
    # --dpo_loss_type dpo_norm, beta 5, cached reference.
    assert cfg.objective == PreferenceConfig(
        kind=PreferenceKind.dpo_norm,
        beta=5.0,
        label_smoothing=0.0,
        sft_weight=0.0,
        reference=Reference.cached,
    )
    # The first learning rate of the sweep 5e-7 to 9e-7; no decay; clipping as in the log of 0924.
    assert cfg.optimizer == AdamWConfig(
        lr=5e-7, weight_decay=0.0, max_grad_norm=1.0, betas=as_composed(cfg), eps=1e-8
    )
    linear_to_zero(cfg, 1_000, 100)  # warm-up 0.1
    assert (cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.trainer.stop_at_step) == (1, None, None)
    assert (cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size) == (4 * 8 * 2 * 2, 2)
    assert cfg.trainer.precision is Precision.bf16
    assert (cfg.data.sequence_length, cfg.data.packing, cfg.data.mask_documents) == (
        2048,
        Packing.best_fit,
        True,
    )
    assert no_router_losses(cfg)


def test_verified_rewards_of_0125_in_small(tmp_path: Path) -> None:
    """open-instruct: olmoe_0125.sh. Its PPO is GRPO here; only what the script has is held."""
    OlmoeConfig(intermediate_size=1024).save_pretrained(tmp_path)
    cfg = recipe("olmoe_grpo", f"model.init_from={tmp_path}")
    assert isinstance(cfg.objective, GrpoConfig)
    assert cfg.optimizer.lr == 3e-7
    assert cfg.objective.kl_coef in (0.01, 0.02, 0.03, 0.07)
    assert (cfg.loss.router_aux_loss_coef, cfg.loss.router_z_loss_coef) == (0, 0)
    reward = build_reward(cfg.objective)
    assert reward("6 x 7 is 42, so 1,042.", "#### 1042") == 1
    assert reward("6 x 7 is 42.", "43") == 0


@pytest.mark.parametrize("name", ["olmoe_1b_7b_0924", "olmoe_1b_7b_0924_anneal"])
def test_large_recipes_pass_a_dry_run_on_meta(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = recipe(name)
    config = olmoe_config(cfg.model)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config).to(torch.bfloat16)
        tokens = torch.zeros(1, cfg.data.sequence_length, dtype=torch.long)
        output = model(tokens)
    assert output.logits.shape == (1, 4096, 50304)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_919_161_856
    counts = parameter_counts(config)
    assert counts.total == 6_919_161_856
    assert counts.active == pytest.approx(1.28e9, rel=5e-3)
    assert train_flops_per_token(config, 4096).total == pytest.approx(7.879e9, rel=1e-4)

    # 64 ranks of 4 sequences: the layout divides, and the data is as the recipe expects it.
    split = Split(documents=1, tokens=10**9, bytes=4 * 10**9, shards=())
    manifest = Manifest(
        settings={},
        source="",
        skipped_empty_documents=0,
        tokenizer_sha256="",
        dtype="uint16",
        vocab_size=50280,
        eos_token_id=50279,
        pad_token_id=1,
        bytes_per_token=4.0,
        unigram_entropy=7.0,
        train=split,
        validation=split,
    )
    monkeypatch.setattr(
        "olmoe_train.training.preflight.model_and_data.read_manifests", lambda data: {"validation": manifest}
    )
    assert validate(cfg, world_size=64) == []


@pytest.mark.parametrize(
    ("experiment", "dense", "parameters"),
    [
        # A layer: 4 projections, 4 norms, a router row, 3 x 2048 x 8192; then embedding, head, last norm.
        (
            "olmoe_1b_7b_0924",
            "olmo_dense_1b",
            16 * (4 * 2048 * 2048 + 5 * 2048 + 3 * 2048 * 8192) + 206_047_232,
        ),
        ("quickstart", "olmo_dense_quickstart", 4 * (4 * 128 * 128 + 5 * 128 + 3 * 128 * 256) + 1_048_704),
    ],
)
def test_dense_comparators_have_the_active_parameters(experiment: str, dense: str, parameters: int) -> None:
    moe = recipe(experiment)
    cfg = recipe(experiment, f"model={dense}", "parallel.expert_parallel_size=1")
    counts, active = (
        parameter_counts(olmoe_config(cfg.model)),
        parameter_counts(olmoe_config(moe.model)).active,
    )
    assert counts.total == counts.active == parameters
    # All that is missing are the other experts' rows of the router.
    model = moe.model
    assert active - counts.total == model.num_hidden_layers * (model.num_experts - 1) * model.hidden_size
    assert replace(cfg, model=model, parallel=moe.parallel) == moe, "everything else is the same"


def test_every_experiment_composes(tmp_path: Path) -> None:
    OlmoeConfig(intermediate_size=1024).save_pretrained(tmp_path)
    names = sorted(path.stem for path in Path(config_directory() / "experiment").glob("*.yaml"))
    assert "quickstart" in names
    for name in names:
        assert isinstance(recipe(name, f"model.init_from={tmp_path}"), TrainConfig)

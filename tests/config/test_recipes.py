"""The released recipes, hyper-parameter by hyper-parameter, against the paper (arXiv 2409.02060)."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from olmoe_train.config import compose
from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import BalanceScope, Convention, Packing, Precision, Schedule
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.reference import config_directory
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.tokens import Manifest, Split
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.optim.schedule import Schedule as LearningRate
from olmoe_train.planning.duration import total_steps
from olmoe_train.planning.flops import parameter_counts, train_flops_per_token
from olmoe_train.training.build import build_schedule
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


def test_fine_tuning_as_released(tmp_path: Path) -> None:
    """The command that github.com/allenai/OLMoE gives for OLMoE-1B-7B-0924-SFT."""
    with pytest.raises(UserError, match=r"model\.init_from=GIVE_AN_HF_DIRECTORY: neither an HF dir"):
        recipe("olmoe_sft")
    OlmoeConfig(intermediate_size=1024).save_pretrained(tmp_path)
    cfg = recipe("olmoe_sft", f"model.init_from={tmp_path}")
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (2e-5, 0.0)
    assert (cfg.scheduler.kind, cfg.scheduler.final_factor) == (Schedule.linear, 0.0)
    assert (cfg.scheduler.warmup_fraction, cfg.scheduler.warmup_start_factor) == (0.03, 0.0)
    assert (cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.trainer.max_tokens) == (2, None, None)
    # --num_processes 8 --per_device_train_batch_size 2 --gradient_accumulation_steps 8
    assert (cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size) == (8 * 2 * 8, 2)
    assert (cfg.data.sequence_length, cfg.data.packing) == (4096, Packing.best_fit)
    assert cfg.data.mask_documents
    assert olmoe_config(cfg.model).to_dict() == olmoe_config(recipe("olmoe_1b_7b_0924").model).to_dict()


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

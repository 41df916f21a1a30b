"""The sides that benchmarks/preference.py compares: a step of DPOTrainer, and of objective=preference."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import OlmoeConfig as TheirConfig
from transformers import OlmoeForCausalLM as TheirModel
from transformers import PreTrainedTokenizerFast
from trl.trainer import utils
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from benchmarks.cpu_step import DTYPES
from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.data.preferences import CollatePreferences, Sample
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.moe.balancing import AuxiliaryLosses
from olmoe_train.optim.clipping import clip_gradients
from olmoe_train.training.batch import Batch, count_tokens
from olmoe_train.training.objectives.log_probs import split_log_probs
from olmoe_train.training.objectives.preference import Preference
from olmoe_train.training.objectives.reference import CachedReference, LiveReference, second_model

VOCABULARY, EOS, PAD, LENGTH = 50304, 0, 1, 1024
PROMPT, COMPLETION = (50, 300), (50, 500)  # tokens, about as in UltraFeedback
LEARNING_RATE, MAX_GRAD_NORM, BETA = 5e-7, 1.0, 0.1  # OLMoE-1B-7B-0924-Instruct
SIDES = ("trl", "trl-compact", "ours")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    """Token ids; both completions end with EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    dtype: str
    reference: str
    pairs: int
    micro_batch: int
    experts: str
    hidden: int


@dataclass(frozen=True)
class Side:
    """One side, ready to step."""

    model: nn.Module
    backward: Callable[[], float]
    """Accumulates the gradients of a step, and returns its loss."""
    update: Callable[[], None]
    """Clips the gradients, updates the weights, and frees the gradients."""

    def step(self) -> float:
        loss = self.backward()
        self.update()
        return loss


def make_pairs(count: int) -> list[Pair]:
    """Random pairs of mixed lengths, the same in every call."""
    generator = np.random.default_rng(0)

    def ids(bounds: tuple[int, int]) -> list[int]:
        return generator.integers(2, VOCABULARY, generator.integers(*bounds, endpoint=True)).tolist()

    return [Pair(ids(PROMPT), [*ids(COMPLETION), EOS], [*ids(COMPLETION), EOS]) for _ in range(count)]


def fields(setting: Setting) -> dict[str, Any]:
    """Options of the model on both sides: OLMoE-1B-7B's proportions, 4 layers."""
    return {
        "hidden_size": setting.hidden,
        "intermediate_size": setting.hidden // 2,
        "num_hidden_layers": 4,
        "num_attention_heads": setting.hidden // 64,
        "num_key_value_heads": setting.hidden // 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "use_cache": False,
    }


def build_theirs(setting: Setting) -> TheirModel:
    """Transformers' model with the weights of seed 0."""
    torch.manual_seed(0)
    model = TheirModel(TheirConfig(**fields(setting)))
    nn.Module.to(model, DTYPES[setting.dtype])
    model.set_experts_implementation(setting.experts)
    return model


def build_ours(setting: Setting, weights: dict[str, Tensor]) -> OlmoeForCausalLM:
    """This project's model with given weights."""
    config = OlmoeConfig(**fields(setting))
    model = OlmoeForCausalLM(config).to(DTYPES[setting.dtype])
    model.load_state_dict(weights)
    model.set_balancer(AuxiliaryLosses(config.num_experts_per_tok, 0.0, 0.0))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Each word is the number of a token."""
    words = {str(number): number for number in range(2, VOCABULARY)} | {"<eos>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def their_side(setting: Setting, compact: bool) -> Side:
    """DPOTrainer's own collator, training_step and optimizer, without the loop around them.

    Args:
        setting: What both sides share.
        compact: Whether only targets are projected to the vocabulary, as TRL does on a GPU.
    """
    model = build_theirs(setting)
    cached = setting.reference == "cached"
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=setting.micro_batch,
        precompute_ref_log_probs=cached,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        max_length=LENGTH,
        gradient_checkpointing=False,
        bf16=False,  # the weights themselves are bf16
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [
        {name: "".join(f" {token}" for token in part if token) for name, part in vars(pair).items()}
        for pair in make_pairs(setting.pairs)
    ]
    trainer = DPOTrainer(
        model=model,
        ref_model=None if cached else build_theirs(setting),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = setting.pairs // setting.micro_batch
    optimizer = trainer.create_optimizer()
    dataset: Any = trainer.train_dataset
    tokenized: list[Any] = list(dataset)
    expected = [(pair.prompt, pair.chosen, pair.rejected) for pair in make_pairs(setting.pairs)]
    found = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in tokenized]
    assert found == expected, "TRL made other tokens of the pairs"
    starts = range(0, setting.pairs, setting.micro_batch)
    batches = [trainer.data_collator(tokenized[start : start + setting.micro_batch]) for start in starts]
    trl_utils: Any = utils
    use_triton = trl_utils._use_triton

    def backward() -> float:
        trl_utils._use_triton = (lambda device: True) if compact else use_triton
        losses = [trainer.training_step(model, dict(batch)) for batch in batches]
        trl_utils._use_triton = use_triton
        return sum(loss.item() for loss in losses)

    def update() -> None:
        trainer.accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        model.zero_grad()

    return Side(model, backward, update)


def as_sample(number: int, pair: Pair) -> Sample:
    sides = (pair.chosen, pair.rejected)
    return {
        "tokens": np.array([token for side in sides for token in (*pair.prompt, *side)], np.int64),
        "is_target": np.concatenate(
            [np.arange(len(pair.prompt) + len(s)) >= len(pair.prompt) for s in sides]
        ),
        "lengths": np.array([len(pair.prompt) + len(side) for side in sides], np.int64),
        "document_ids": np.array([2 * number, 2 * number + 1], np.int64),
        "wanted": np.array([True, False]),
    }


def our_side(setting: Setting) -> Side:
    """The objective of objective=preference on packed micro-batches, without the loop around it."""
    init_distributed("cpu")
    weights = build_theirs(setting).state_dict()
    model = build_ours(setting, weights)
    model.train()
    collate = CollatePreferences(DataConfig(sequence_length=LENGTH, packing=Packing.best_fit), PAD)
    samples = [as_sample(number, pair) for number, pair in enumerate(make_pairs(setting.pairs))]
    starts = range(0, setting.pairs, setting.micro_batch)
    batches: list[Batch] = [collate(samples[start : start + setting.micro_batch]) for start in starts]
    reference: CachedReference | LiveReference
    if setting.reference == "cached":
        stored = split_log_probs(model, batches, 0, 2 * setting.pairs, CPU)
        reference = CachedReference(stored.sum_D, None, torch.empty(0), None)
    else:
        frozen = build_ours(setting, weights)
        frozen.requires_grad_(False)
        reference = LiveReference(second_model(frozen))
    objective = Preference(PreferenceConfig(beta=BETA), model, reference, setting.pairs, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def backward() -> float:
        step = [dict(batch) for batch in batches]
        totals = count_tokens(step, False, CPU)
        objective.begin_step(model, step, totals, logged=True)
        loss = 0.0
        for batch in step:
            share, _ = objective(model, batch, totals)
            share.backward()
            loss += share.item()
        return loss

    def update() -> None:
        clip_gradients(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Side(model, backward, update)


def build_side(name: str, setting: Setting) -> Side:
    return our_side(setting) if name == "ours" else their_side(setting, compact=name == "trl-compact")

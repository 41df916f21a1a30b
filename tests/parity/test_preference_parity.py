"""Losses, metrics and gradients of preferences against TRL 1.16.0's own code.

TRL's losses are methods of its trainers. A trainer is not built here: the methods get an object with the
attributes that they read, and Transformers' model computes the log-probabilities that they ask it for. TRL
rewrites `forward` of the model for that (fused_lm_head=True), within its trainer; here log_softmax of the
model's logits stands in its place.

Shapes: N completions, B rows, S tokens per row, V vocabulary.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from olmoe_train.config.choices import PreferenceKind
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.training.objectives.preference_losses import (
    Completions,
    kto_losses,
    kto_metrics,
    log_odds_ratio,
    pair_losses,
    pair_metrics,
)
from tests.support.pair import TINY, make_pair

TOLERANCE = 1e-5
# Prompt of 4 tokens; lengths of the completions of each row. Rows 0, 1 are chosen and rows 2, 3 rejected.
PROMPT, COMPLETIONS = 4, (6, 3, 2, 7)
WEIGHTS = ("model.layers.0.mlp.gate.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight")


class ModelForTrl(nn.Module):
    """Transformers' model with the outputs of TRL's fused head: log_probs [B, S - 1], 0 without a label."""

    is_gradient_checkpointing = False  # TRL asks

    def __init__(self, model: transformers.OlmoeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        assert fused_lm_head
        logits_BSV = self.model(**inputs).logits[:, :-1]
        log_probs_BSV = logits_BSV.log_softmax(-1)
        targets_BS = labels[:, 1:]
        at_target_BS = log_probs_BSV.gather(2, targets_BS.clamp(min=0)[..., None]).squeeze(2)
        return SimpleNamespace(
            log_probs=at_target_BS * (targets_BS >= 0),
            entropy=-(log_probs_BSV.exp() * log_probs_BSV).sum(-1),
            mean_logits=logits_BSV.mean(-1),
            is_top1=logits_BSV.argmax(-1) == targets_BS,
        )


def batch_of_completions(seed: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and completion_mask, int64 [4, S], padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    place_S = torch.arange(PROMPT + max(COMPLETIONS))
    length_B1 = PROMPT + torch.tensor(COMPLETIONS)[:, None]
    mask_BS = (place_S < length_B1).long()
    ids_BS = torch.randint(3, TINY["vocab_size"], mask_BS.shape, generator=generator)
    return {
        "input_ids": ids_BS.masked_fill(mask_BS == 0, 1),
        "attention_mask": mask_BS,
        "completion_mask": mask_BS * (place_S >= PROMPT),
    }


def our_sums(model: OlmoeForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probability of each row's completion, fp32 [B]."""
    targets_BS = batch["input_ids"][:, 1:].masked_fill(batch["completion_mask"][:, 1:] == 0, -100)
    targets_BS = nn.functional.pad(targets_BS, (0, 1), value=-100)
    positions_P = (targets_BS.flatten() >= 0).nonzero().squeeze(1)
    output = model.training_forward(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        targets=targets_BS.flatten()[positions_P],
        target_positions=positions_P,
    )
    assert output.log_probs is not None
    return torch.segment_reduce(output.log_probs, "sum", lengths=torch.tensor(COMPLETIONS))


def trainer_state(model: nn.Module, reference: nn.Module | None, **options: Any) -> SimpleNamespace:
    """What TRL's methods read of their trainer."""
    return SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        ld_alpha=None,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )


def models() -> tuple[tuple[OlmoeForCausalLM, ModelForTrl], tuple[OlmoeForCausalLM, ModelForTrl]]:
    """(Model to train, reference), each in both implementations. router_aux_loss_coef is 0."""
    pairs = [make_pair(TINY | {"router_aux_loss_coef": 0.0}, seed) for seed in (0, 1)]
    (ours, theirs), (ours_reference, theirs_reference) = pairs
    return (ours, ModelForTrl(theirs)), (ours_reference, ModelForTrl(theirs_reference))


def our_completions(
    model: OlmoeForCausalLM, reference: OlmoeForCausalLM, batch: dict[str, Tensor]
) -> Completions:
    with torch.no_grad():
        reference_N = our_sums(reference, batch)
    return Completions(our_sums(model, batch), reference_N, torch.tensor(COMPLETIONS).float())


def assert_same_gradients(
    ours: OlmoeForCausalLM, theirs: ModelForTrl, loss: Tensor, their_loss: Tensor
) -> None:
    assert loss.item() == pytest.approx(their_loss.item(), rel=TOLERANCE)
    gradients = torch.autograd.grad(loss, [ours.get_parameter(name) for name in WEIGHTS])
    expected = torch.autograd.grad(their_loss, [theirs.model.get_parameter(name) for name in WEIGHTS])
    for name, ours_of, theirs_of in zip(WEIGHTS, gradients, expected, strict=True):
        assert theirs_of.norm() > 0, name
        assert (ours_of - theirs_of).norm() <= TOLERANCE * theirs_of.norm(), name


@pytest.mark.parametrize(
    ("kind", "loss_type", "beta"),
    [
        (PreferenceKind.dpo, "sigmoid", 0.1),
        (PreferenceKind.ipo, "ipo", 0.5),
        (PreferenceKind.dpo_norm, "sigmoid_norm", 5.0),
    ],
)
def test_pairs_with_a_reference_as_dpo_trainer(kind: PreferenceKind, loss_type: str, beta: float) -> None:
    (ours, theirs), (reference, their_reference) = models()
    batch = batch_of_completions(2)
    state = trainer_state(
        theirs,
        their_reference,
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
    )
    their_loss = DPOTrainer._compute_loss(state, theirs, batch, return_outputs=False)

    both = our_completions(ours, reference, batch)
    chosen, rejected = both.select(slice(0, 2)), both.select(slice(2, 4))
    cfg = PreferenceConfig(kind=kind, beta=beta)
    assert_same_gradients(ours, theirs, pair_losses(cfg, chosen, rejected).mean(), their_loss)
    # TRL logs sums for every loss, and so do the names without _per_token.
    metrics = pair_metrics(cfg, chosen, rejected)
    logged = {name: values[0] for name, values in state._metrics["train"].items() if name in metrics}
    assert len(logged) == 6
    for name, value in logged.items():
        assert metrics[name].mean().item() == pytest.approx(value, rel=TOLERANCE), name


def test_completions_with_labels_as_kto_trainer() -> None:
    """The mismatched completions are given to both, here those of another batch.

    TRL makes them by rotating the completions of its batch by one, data/preferences.py of the record before.
    """
    (ours, theirs), (reference, their_reference) = models()
    batch, mismatched = batch_of_completions(3), batch_of_completions(4)
    wanted_N = torch.tensor([True, False, True, False])
    state = trainer_state(
        theirs,
        their_reference,
        beta=0.1,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.33,
        undesirable_weight=0.5,
    )
    state._compute_kl_logps = lambda model, inputs: KTOTrainer._compute_kl_logps(state, model, inputs)
    inputs = batch | {"KL_" + name: tensor for name, tensor in mismatched.items()} | {"label": wanted_N}
    their_loss = KTOTrainer._compute_loss(state, theirs, inputs, return_outputs=False)

    completions = our_completions(ours, reference, batch)
    with torch.no_grad():
        z = our_completions(ours, reference, mismatched).gain.mean().clamp(min=0)
    assert z.item() == pytest.approx(state._metrics["train"]["kl"][0], rel=TOLERANCE)
    cfg = PreferenceConfig(kind=PreferenceKind.kto, desirable_weight=1.33, undesirable_weight=0.5)
    assert_same_gradients(ours, theirs, kto_losses(cfg, completions, wanted_N, z).mean(), their_loss)
    metrics = kto_metrics(cfg, completions, wanted_N, torch.tensor([2.0, 2.0]))
    logged = {name: values[0] for name, values in state._metrics["train"].items() if name in metrics}
    assert len(logged) >= 4
    for name, value in logged.items():
        assert metrics[name].item() == pytest.approx(value, rel=TOLERANCE), name


def random_pairs() -> tuple[Completions, Completions]:
    generator = torch.Generator().manual_seed(0)

    def side() -> Completions:
        tokens_N = torch.randint(1, 40, (16,), generator=generator).float()
        mean_N = torch.rand(16, generator=generator).log()
        return Completions(mean_N * tokens_N, torch.zeros(16), tokens_N)

    return side(), side()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_as_cpo_trainer(smoothing: float) -> None:
    """Of CPO's loss only the preference part: SimPO is CPO with cpo_alpha=0, and its alpha is AlphaPO's."""
    chosen, rejected = random_pairs()
    state = trainer_state(nn.Identity(), None, beta=2.0, loss_type="simpo", simpo_gamma=0.5, alpha=0.0)
    state.label_smoothing = smoothing
    # CPOTrainer divides by the tokens before, for loss_type="simpo".
    losses_N, _, _ = CPOTrainer.cpo_loss(state, chosen.mean, rejected.mean)
    cfg = PreferenceConfig(kind=PreferenceKind.simpo, beta=2.0, gamma=0.5, label_smoothing=smoothing)
    torch.testing.assert_close(pair_losses(cfg, chosen, rejected), losses_N, rtol=TOLERANCE, atol=0)


def test_the_odds_ratio_as_orpo_trainer() -> None:
    """Only the odds ratio agrees: TRL's NLL is a mean over all tokens of the chosen rows, prompts too."""
    chosen, rejected = random_pairs()
    state = trainer_state(nn.Identity(), None, beta=0.1)
    weighted_N, _, _, log_ratio, log_odds = ORPOTrainer.odds_ratio_loss(state, chosen.mean, rejected.mean)
    cfg = PreferenceConfig(kind=PreferenceKind.orpo, beta=0.1)
    # TRL subtracts its weighted term from the NLL.
    ours_N = pair_losses(cfg, chosen, rejected) + chosen.mean
    torch.testing.assert_close(ours_N, -weighted_N, rtol=TOLERANCE, atol=1e-6)
    metrics = pair_metrics(cfg, chosen, rejected)
    assert metrics["log_odds_ratio"].mean().item() == pytest.approx(log_ratio.item(), rel=TOLERANCE)
    assert log_odds_ratio(chosen, rejected).mean().item() == pytest.approx(log_odds.item(), rel=TOLERANCE)

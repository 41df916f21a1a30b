"""The balancing methods: the scopes of the load-balancing loss, the sequence-wise loss, the bias without a
loss, and the options of the routers. By hand, by slow definitions, by finite differences, and on collapsed
routers."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from olmoe_train.config.choices import ActivationCheckpointing
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.losses import load_balancing_loss, sequence_balancing_loss
from olmoe_train.model.moe.balancing import AuxiliaryLosses, Balancer, set_router_options
from olmoe_train.model.moe.block import OlmoeTopKRouter
from olmoe_train.model.moe.loss_free import LossFreeBias
from olmoe_train.model.moe.router_stats import RouterStats, router_stats, stack_layers
from olmoe_train.training.batch import count_tokens
from olmoe_train.training.objectives.router_terms import RouterTerms
from tests.support.sizes import SIZES

LAYERS, SEQUENCES, LENGTH, EXPERTS, TOP_K = 2, 5, 7, 6, 2
# The last sequence is all padding.
MASK_BS = (torch.arange(LENGTH) >= torch.tensor([0, 2, 5, 6, 7])[:, None]).double()


def sequence_loss(
    logits_LBSE: Tensor, mask_BS: Tensor | None, convention: str = "olmoe", **totals: Tensor
) -> Tensor:
    layers = []
    for logits_BSE in logits_LBSE:
        logits_TE = logits_BSE.flatten(0, 1)
        mask_T = None if mask_BS is None else mask_BS.flatten()
        chosen_TK = logits_TE.detach().topk(TOP_K).indices
        layers.append(router_stats(logits_TE, logits_TE.softmax(-1), chosen_TK, mask_T, len(logits_BSE)))
    return sequence_balancing_loss(stack_layers(layers), TOP_K, convention, **totals)


def sequence_loss_by_definition(logits_LBSE: Tensor, mask_BS: Tensor) -> Tensor:
    """arXiv 2412.19437, equations 17 to 20, for softmax scores: sum_e f_e P_e of each sequence and layer; the
    mean over sequences, weighted by their tokens, and over layers."""
    loss = torch.zeros((), dtype=torch.float64)
    for logits_BSE in logits_LBSE:
        for logits_SE, mask_S in zip(logits_BSE, mask_BS, strict=True):
            tokens_SE = logits_SE[mask_S == 1]
            for expert in range(EXPERTS):
                chosen = sum(expert in row.topk(TOP_K).indices for row in tokens_SE)
                if len(tokens_SE):
                    f = EXPERTS / (TOP_K * len(tokens_SE)) * chosen
                    p = tokens_SE.softmax(-1)[:, expert].mean()
                    loss = loss + len(tokens_SE) * f * p
    return loss / (mask_BS.sum() * len(logits_LBSE))


def random_logits() -> Tensor:
    shape = (LAYERS, SEQUENCES, LENGTH, EXPERTS)
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_batch_can_be_balanced_where_no_sequence_is() -> None:
    """One sequence goes to expert 0 and the other to expert 1, with probability 0.9: N/K x 1 x 0.9 = 1.8."""
    logits_BSE = torch.tensor([[[0.9, 0.1]] * 3, [[0.1, 0.9]] * 3]).log()
    assert load_balancing_loss([logits_BSE.flatten(0, 1)], 2, 1).item() == pytest.approx(1.0)
    stats = router_stats(
        *(logits_BSE.flatten(0, 1), logits_BSE.flatten(0, 1).softmax(-1)),
        torch.tensor([0, 0, 0, 1, 1, 1])[:, None],
        sequences=2,
    )
    assert sequence_balancing_loss(stats, 1).item() == pytest.approx(1.8)
    with pytest.raises(ValueError, match="convention='hf' pools the layers"):
        sequence_balancing_loss(stats, 1, "hf")


@pytest.mark.parametrize("padded", [False, True])
def test_the_sequence_wise_loss_is_its_definition(padded: bool) -> None:
    logits = random_logits().requires_grad_()
    mask_BS = MASK_BS if padded else torch.ones_like(MASK_BS)
    found = sequence_loss(logits, mask_BS if padded else None)
    expected = sequence_loss_by_definition(logits, mask_BS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sequence_loss(logits, mask_BS, "megatron"), LAYERS * expected)
    (gradient,), (wanted,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, wanted)
    for place in ((0, 0, 1, 2), (1, 1, 6, 5), (1, 2, 5, 0)):
        step = torch.zeros_like(logits)
        step[place] = 1e-5
        with torch.no_grad():
            slope = (sequence_loss(logits + step, mask_BS) - sequence_loss(logits - step, mask_BS)) / 2e-5
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-10)


def test_the_sequence_wise_loss_does_not_depend_on_cuts_and_padding() -> None:
    logits, tokens = random_logits(), MASK_BS.sum()
    whole = sequence_loss(logits, MASK_BS)
    # The second part is three tokens shorter: only padding is cut off.
    parts = [(logits[:, :2], MASK_BS[:2]), (logits[:, 2:, 3:], MASK_BS[2:, 3:])]
    torch.testing.assert_close(sum(sequence_loss(*part, total_tokens=tokens) for part in parts), whole)


# --- scopes, on one rank; with several ranks: test_equivalence.py -------------------------------------------


def micro_batch(counts: list[float], probabilities: list[float]) -> RouterStats:
    counts_LE, probabilities_LE = torch.tensor([counts]), torch.tensor([probabilities])
    return RouterStats(counts_LE, probabilities_LE, torch.zeros(1), torch.zeros(1))


# E = 2, K = 1: four tokens, then two.
STEP = [micro_batch([3.0, 1.0], [2.5, 1.5]), micro_batch([0.0, 2.0], [0.5, 1.5])]
IDS = [torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64)]


def terms_of_a_step(losses: AuxiliaryLosses) -> tuple[list[dict[str, float]], int]:
    """The terms of both micro-batches, and how many forward passes without gradient there were."""
    init_distributed("cpu")
    remaining = list(STEP)

    def forward(**columns: Tensor) -> SimpleNamespace:
        return SimpleNamespace(router=remaining.pop(0))

    gate = SimpleNamespace(weight=torch.zeros(1, requires_grad=True))
    model: Any = SimpleNamespace(
        balancer=losses,
        config=SimpleNamespace(num_hidden_layers=1, num_experts=2),
        decoder_layers=[SimpleNamespace(mlp=SimpleNamespace(gate=gate))],
        training_forward=forward,
    )
    batches = [{"input_ids": ids, "targets": ids} for ids in IDS]
    totals = count_tokens(batches, False, torch.device("cpu"))
    routers = RouterTerms(model, torch.device("cpu"))
    routers.begin_step(model, batches, logged=True)
    found = [routers.add(torch.zeros(()), stats, totals)[1] for stats in STEP]
    return [{name: term.item() for name, term in of_batch.items()} for of_batch in found], 2 - len(remaining)


@pytest.mark.parametrize(
    ("scope", "shares", "passes"),
    [
        # N/K sum_e load_e p_e / 6 tokens: 2 (3/4 2.5 + 1/4 1.5) / 6 and 2 (0 + 1.5) / 6.
        ("micro_batch", [0.75, 0.5], 0),
        ("all_ranks", [0.75, 0.5], 0),
        # The second micro-batch sees 3 and 3 of 6 tokens: 2 (1/2 0.5 + 1/2 1.5) / 6.
        ("running", [0.75, 1 / 3], 0),
        ("global_batch", [2 / 3, 1 / 3], 2),
    ],
)
def test_the_scopes_by_hand(scope: str, shares: list[float], passes: int) -> None:
    terms, counted = terms_of_a_step(AuxiliaryLosses(1, 0.01, 0.0, scope=scope))
    assert [of_batch["load_balancing_loss"] for of_batch in terms] == pytest.approx(shares)
    assert counted == passes


def test_a_loss_without_weight_is_that_of_the_step_and_needs_no_pass() -> None:
    terms, counted = terms_of_a_step(AuxiliaryLosses(1, 0.0, 0.0, scope="micro_batch"))
    assert "load_balancing_loss" not in terms[0]
    assert terms[1]["load_balancing_loss"] == pytest.approx(1.0)
    assert counted == 0


# --- the bias -----------------------------------------------------------------------------------------------


def test_the_bias_by_hand() -> None:
    balancer = LossFreeBias(2, 4, 0.1, AuxiliaryLosses(2, 0.0, 0.0))
    balancer.bias[1] = torch.tensor([-0.25, 0.0, 0.0, 0.25])
    router = OlmoeTopKRouter(
        OlmoeConfig(**SIZES | {"hidden_size": 4, "num_attention_heads": 2, "num_experts": 4})
    )
    router.weight.data = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().t().expand(4, 4) / 4
    router.scores = partial(balancer.scores, 1)
    _, _, weights_TK, chosen_TK = router(torch.ones(1, 4))
    # Scores 0.15, 0.3, 0.2, 0.35; the weights are probabilities.
    assert chosen_TK.tolist() == [[3, 1]]
    assert weights_TK[0].tolist() == pytest.approx([0.1, 0.3])
    balancer.update(torch.tensor([[6.0, 2.0, 4.0, 4.0], [0.0, 0.0, 1.0, 0.0]]))
    assert balancer.bias.flatten().tolist() == pytest.approx([-0.1, 0.1, 0.0, 0.0, -0.15, 0.1, -0.1, 0.35])
    before = balancer.bias.clone()
    balancer.update(torch.zeros(2, 4))
    assert torch.equal(balancer.bias, before)


# --- collapsed routers --------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[], Balancer]] = {
    "none": lambda: AuxiliaryLosses(2, 0.0, 0.0),
    "aux, running": lambda: AuxiliaryLosses(2, 0.1, 0.0, scope="running"),
    "aux, global_batch": lambda: AuxiliaryLosses(2, 0.1, 0.0),
    "sequence": lambda: AuxiliaryLosses(2, 0.0, 0.0, sequence_coef=0.1),
    "loss_free": lambda: LossFreeBias(1, 8, 0.02, AuxiliaryLosses(2, 0.0, 0.0)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_collapsed_router_recovers(method: str) -> None:
    """Every token is sent to the same two of eight experts: a violation of 8 / 2 - 1 = 3."""
    init_distributed("cpu")
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"num_hidden_layers": 1, "initializer_range": 0.2}))
    balancer = METHODS[method]()
    model.set_balancer(balancer)
    with torch.no_grad():  # all tokens have a direction in common, which the router sends to experts 0 and 1
        model.model.embed_tokens.weight += 0.5
        model.decoder_layers[0].mlp.gate.weight[:2] += 0.04
    routers = RouterTerms(model, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    batches = [{"input_ids": torch.randint(2, SIZES["vocab_size"], (4, 16))} for _ in range(2)]
    violations = []
    for _ in range(40):
        step = [batch | {"targets": batch["input_ids"].roll(-1, 1)} for batch in batches]
        totals = count_tokens(step, False, torch.device("cpu"))
        routers.begin_step(model, step, logged=False)
        for batch in step:
            output = model.training_forward(**batch)
            routers.add(output.ce_sum / totals.num_targets, output.router, totals)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        routers.end_step(torch.tensor(False))
        load_E = routers.sums.counts_LE[0]
        violations.append((load_E.max() / load_E.mean() - 1).item())
    assert violations[0] > 2.5
    assert violations[-1] > 2 if method == "none" else violations[-1] < 1, violations


# --- options of the routers ---------------------------------------------------------------------------------


def test_a_temperature_divides_the_logits() -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(**SIZES)
    hot, divided, x_TD = OlmoeTopKRouter(config), OlmoeTopKRouter(config), torch.randn(9, 32)
    hot.weight.data.normal_()
    hot.temperature = 4.0
    divided.weight.data = hot.weight.data / 4
    for found, expected in zip(hot(x_TD), divided(x_TD), strict=True):
        assert torch.equal(found, expected)


def test_jitter_multiplies_the_input_in_training_only() -> None:
    config = OlmoeConfig(**SIZES | {"hidden_size": 8})
    router, x_TD = OlmoeTopKRouter(config), torch.full((500, 8), 3.0, dtype=torch.bfloat16)
    router.weight.data = torch.eye(8)  # the logits are the input
    router.jitter = 0.01
    noise_TD = router(x_TD)[0] / 3
    assert noise_TD.min().item() == pytest.approx(0.99, abs=2e-4)
    assert noise_TD.max().item() == pytest.approx(1.01, abs=2e-4)
    assert noise_TD.mean().item() == pytest.approx(1.0, abs=5e-4)
    assert torch.equal(router.eval()(x_TD)[0], x_TD.float())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_draws_the_same_jitter(mode: str) -> None:
    def gradients(checkpointing: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
        set_router_options((layer.mlp for layer in model.decoder_layers), temperature=2.0, jitter=0.5)
        checkpoint_activations(model, ActivationCheckpointing(checkpointing))
        ids_BS = torch.arange(2, 34)[None]
        output = model.training_forward(ids_BS, ids_BS)
        torch.manual_seed(1)  # what is recomputed must not depend on where the generator is now
        (output.ce_sum + output.router.squared_logsumexp_L.sum()).backward()
        return [cast(Tensor, parameter.grad) for parameter in model.parameters()]

    for found, expected in zip(gradients(mode), gradients("none"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

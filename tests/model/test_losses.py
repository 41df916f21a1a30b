"""The declared losses against numbers worked by hand, and their invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.model import cross_entropy, losses
from olmoe_train.model.cross_entropy import cross_entropy_sum
from olmoe_train.model.losses import load_balancing_loss, router_losses, router_z_loss


def collapsed_logits(layers: int, tokens: int, experts: int, top_k: int, gap: float) -> list[Tensor]:
    """Layer l sends every token to experts l*top_k .. l*top_k + top_k - 1, by a logit lead of `gap`."""
    logits = torch.zeros(layers, tokens, experts)
    for layer in range(layers):
        logits[layer, :, layer * top_k : (layer + 1) * top_k] = gap
    return list(logits)


def test_balance_reads_one_per_layer_and_top_k_pooled() -> None:
    # 8 tokens, 4 experts, top-2: token t prefers experts t%4 and (t+1)%4, so each expert gets 4 of 16
    # choices. Probability sums are equal by symmetry: p_e = 1/4. LB = E/(T K) * sum c p = 4/16 * 4 * (4 *
    # 1/4) = 1. Pooled: 4 * 4 * (1/2 * 1/4) = 2.
    logits = torch.zeros(8, 4)
    for t in range(8):
        logits[t, t % 4], logits[t, (t + 1) % 4] = 2.0, 1.0
    layers = [logits, logits.clone()]
    assert load_balancing_loss(layers, 4, 2).item() == pytest.approx(1.0, abs=1e-6)
    assert load_balancing_loss(layers, 4, 2, convention="hf").item() == pytest.approx(2.0, abs=1e-6)
    assert load_balancing_loss(layers, 4, 2, convention="megatron").item() == pytest.approx(2.0, abs=1e-6)


def test_collapse_on_different_experts_is_seen_by_olmoe_and_missed_by_pooling() -> None:
    # Each of 8 layers sends all tokens to its own 8 of 64 experts. Within a layer c_e = T on 8 experts; their
    # probability is e^g / (8 e^g + 56) each, so LB = 64/(8 T) * 8 T * p = 64 p. At g = 8: p = 0.124707, LB =
    # 7.98126. Pooled over layers every expert has T of 8 T tokens: (1/8) * (1/64) summed over 64, times 64 =
    # 8.000: "perfect".
    logits = collapsed_logits(layers=8, tokens=32, experts=64, top_k=8, gap=8.0)
    by_hand = 64 * math.exp(8) / (8 * math.exp(8) + 56)
    assert by_hand == pytest.approx(7.98, abs=0.005)
    assert load_balancing_loss(logits, 64, 8).item() == pytest.approx(by_hand, rel=1e-6)
    assert load_balancing_loss(logits, 64, 8, convention="megatron").item() == pytest.approx(
        8 * by_hand, rel=1e-6
    )
    assert load_balancing_loss(logits, 64, 8, convention="hf").item() == pytest.approx(8.0, rel=1e-6)


def test_load_balancing_by_hand() -> None:
    # 2 tokens, 2 experts, top-1, probabilities (3/4, 1/4) and (1/4, 3/4) -> c = (1, 1), p = (1/2, 1/2): LB =
    # 2/2 * 1 = 1. Second layer (3/4, 1/4) twice: c = (2, 0), p = (3/4, 1/4): LB = 2/2 * 2 * 3/4 = 1.5. Mean
    # 1.25, sum 2.5. Pooled: c/T = (3, 1)/4, p = (5/8, 3/8): 2 * (15/32 + 3/32) = 1.125.
    up = math.log(3.0)
    first, second = torch.tensor([[up, 0.0], [0.0, up]]), torch.tensor([[up, 0.0], [up, 0.0]])
    got = {
        name: load_balancing_loss([first, second], 2, 1, convention=name).item()
        for name in losses.CONVENTIONS
    }
    expected = {"olmoe": 1.25, "olmoe_0924": 1.25, "hf": 1.125, "megatron": 2.5}
    assert got == pytest.approx(expected, rel=1e-6)


def test_z_loss_by_hand() -> None:
    # logsumexp(0, 0) = ln 2; logsumexp(ln 3, 0) = ln 4. Z = (ln2^2 + ln4^2) / 2.
    logits = [torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])]
    z = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(z, rel=1e-6)
    indices = [torch.zeros(1, 2, dtype=torch.long)] * 2  # top-2
    as_released = router_losses(logits, indices, 2, convention="olmoe_0924")[1]
    assert as_released.item() == pytest.approx(z / 2, rel=1e-6)
    assert router_losses(logits, indices, 2, convention="megatron")[1].item() == pytest.approx(
        2 * z, rel=1e-6
    )


@pytest.mark.parametrize("convention", losses.CONVENTIONS)
def test_padding_never_counts(convention: str) -> None:
    torch.manual_seed(0)
    real = [torch.randn(6, 8) for _ in range(3)]
    padded = [torch.cat([logits, 100 * torch.randn(4, 8)]) for logits in real]
    mask = torch.tensor([1] * 6 + [0] * 4)
    expected = load_balancing_loss(real, 8, 2, convention=convention)
    torch.testing.assert_close(load_balancing_loss(padded, 8, 2, mask, convention), expected)
    torch.testing.assert_close(router_z_loss(padded, mask), router_z_loss(real))


def test_stable_at_logits_of_300() -> None:
    # e^300 overflows fp32. One logit 300, others 0: logsumexp = 300, softmax = (1, 0, 0, 0).
    logits = torch.tensor([[300.0, 0.0, 0.0, 0.0]] * 3, requires_grad=True)
    z_loss, balance = router_z_loss([logits]), load_balancing_loss([logits], 4, 1)
    assert z_loss.item() == pytest.approx(90_000.0)
    assert balance.item() == pytest.approx(4.0)
    (z_loss + balance).backward()
    assert torch.isfinite(logits.grad).all()
    # d Z / d logit_0 = 2 * 300 * softmax / T = 200 for each of 3 tokens.
    assert logits.grad[:, 0].tolist() == pytest.approx([200.0] * 3)


def test_bf16_logits_are_computed_in_fp32() -> None:
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for value, reference in (
        (router_z_loss([logits]), router_z_loss([logits.double()])),
        (load_balancing_loss([logits], 16, 4), load_balancing_loss([logits.double()], 16, 4)),
    ):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(reference.item(), rel=1e-6)


@pytest.mark.parametrize("convention", losses.CONVENTIONS)
def test_shares_of_a_batch_sum_to_its_loss_and_gradient(convention: str) -> None:
    """Cut 12 tokens into 5, 3 and 4 with global counts: same value, same gradient."""
    torch.manual_seed(2)
    logits = [torch.randn(12, 8) for _ in range(2)]
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]).float()

    whole = [layer.clone().requires_grad_() for layer in logits]
    top = [layer.topk(2).indices for layer in whole]
    balance, z_loss = router_losses(whole, top, 8, mask, convention)
    (balance + 0.1 * z_loss).backward()

    parts = [layer.clone().requires_grad_() for layer in logits]
    counts = losses.expert_counts(top, 8, mask)
    total = torch.zeros(())
    for rows in (slice(0, 5), slice(5, 8), slice(8, 12)):
        part_balance, part_z = router_losses(
            [p[rows] for p in parts], [t[rows] for t in top], 8, mask[rows], convention, mask.sum(), counts
        )
        (part_balance + 0.1 * part_z).backward()
        total += (part_balance + 0.1 * part_z).detach()
    torch.testing.assert_close(total, (balance + 0.1 * z_loss).detach())
    for whole_layer, part_layer in zip(whole, parts, strict=True):
        torch.testing.assert_close(part_layer.grad, whole_layer.grad)


def test_micro_batch_scope_is_the_token_weighted_mean_of_the_parts() -> None:
    torch.manual_seed(3)
    logits = torch.randn(12, 8)
    top = logits.topk(2).indices
    shares = [
        router_losses([logits[rows]], [top[rows]], 8, total_tokens=torch.tensor(12.0))[0]
        for rows in (slice(0, 4), slice(4, 12))
    ]
    own = [load_balancing_loss([logits[rows]], 8, 2) for rows in (slice(0, 4), slice(4, 12))]
    torch.testing.assert_close(sum(shares), (4 * own[0] + 8 * own[1]) / 12)


def test_global_scope_gradient_by_finite_differences() -> None:
    torch.manual_seed(4)
    logits = torch.randn(6, 4, dtype=torch.float64)
    counts = torch.tensor([[5.0, 1.0, 4.0, 2.0]])
    top = logits.topk(2).indices

    def balance(x: Tensor) -> Tensor:
        total_tokens = torch.tensor(6.0)
        balance, z_loss = router_losses([x], [top], 4, total_tokens=total_tokens, total_counts_LE=counts)
        return balance + z_loss

    x = logits.clone().requires_grad_()
    balance(x).backward()
    for t, e in ((0, 0), (3, 2), (5, 3)):
        step = torch.zeros_like(logits)
        step[t, e] = 1e-4
        slope = (balance(logits + step) - balance(logits - step)) / 2e-4
        assert x.grad[t, e].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-10)


def test_unknown_convention_and_wrong_mask_are_named() -> None:
    with pytest.raises(ValueError, match=r"convention='switch'.*olmoe_0924"):
        load_balancing_loss([torch.zeros(2, 4)], 4, 1, convention="switch")
    with pytest.raises(ValueError, match="attention_mask has 3 tokens, router_logits 2"):
        router_z_loss([torch.zeros(2, 4)], torch.ones(3))


@pytest.mark.parametrize("rows", [1, 7, 8, 20])
def test_chunked_cross_entropy_equals_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "HEAD_CHUNK_ROWS", 8)
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    labels = torch.randint(0, 40, (rows,))
    labels[::3] = cross_entropy.IGNORE_INDEX
    expected = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="sum")
    expected_grads = torch.autograd.grad(3.0 * expected, (hidden, weight))
    got = cross_entropy_sum(hidden, weight, labels)
    torch.testing.assert_close(got, expected)
    for grad, reference in zip(torch.autograd.grad(3.0 * got, (hidden, weight)), expected_grads, strict=True):
        torch.testing.assert_close(grad, reference)


def test_cross_entropy_of_bf16_inputs_is_fp32() -> None:
    # Uniform logits over 1000 words: each target costs ln 1000 = 6.9078, which bf16 would round to 6.90625.
    hidden, weight = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(1000, 8, dtype=torch.bfloat16)
    loss = cross_entropy_sum(hidden, weight, torch.arange(4))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4 * math.log(1000), rel=1e-6)

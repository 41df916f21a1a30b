"""GRPO (arXiv 2402.03300): reinforcement learning with verified rewards, on completions of the model itself.

In every step the model samples G completions of each prompt. With r the reward of a completion:

    A = (r - mean of its group) / (standard deviation of its group), for all tokens of the completion
    ratio = exp(log p - log p when sampled), for each token
    loss of a token = -min(ratio A, clip(ratio) A) + kl_coef (exp(q - log p) - (q - log p) - 1)

q is the token's log-probability under the initial model. The loss is the mean over the completions of the
global batch of each completion's mean over its tokens.

Shapes: B prompts of a micro-batch, N completions (B x G), P tokens of all completions, L layers, K top-k.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from olmoe_train.config.choices import RoutingUse
from olmoe_train.config.objective import GrpoConfig
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.mixture import VALIDATION
from olmoe_train.data.preferences import CollatePreferences
from olmoe_train.data.prompts import FILLER, NO_TOKEN
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.routing_record import OWN_CHOICE, replay_routing
from olmoe_train.training.batch import Batch, Totals, to_device
from olmoe_train.training.objectives.base import Heartbeat, RouterSums, Validation
from olmoe_train.training.objectives.log_probs import target_log_probs, without_dropout
from olmoe_train.training.objectives.preference_data import validation_batches, validation_sources
from olmoe_train.training.objectives.reference import ReferenceModel
from olmoe_train.training.objectives.rewards import Reward
from olmoe_train.training.objectives.router_terms import RouterTerms
from olmoe_train.training.objectives.sampling import Completions, Draws, sample_completions


class Grpo:
    """loss = mean over the completions of the global batch of their tokens' mean, + the routers' losses."""

    columns: tuple[str, ...] = ("input_ids", "attention_mask", "answers", "sample_index")

    def __init__(
        self,
        cfg: GrpoConfig,
        model: OlmoeForCausalLM,
        reward: Reward,
        reference_model: ReferenceModel | None,
        tokenizer: Tokenizer,
        collate: CollatePreferences,
        prompts_per_step: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            cfg: Sizes and coefficients.
            model: The model to train, with its balancer.
            reward: Reward of a completion.
            reference_model: The initial model, for kl_coef; None: there is none.
            tokenizer: Decodes completions and answers.
            collate: Lays completions out in rows.
            prompts_per_step: Prompts of the global batch.
            seed: Seed of the run.
            device: The device of this rank.
        """
        self.cfg, self.reward, self.reference_model = cfg, reward, reference_model
        self.tokenizer, self.collate = tokenizer, collate
        self.completions = prompts_per_step * cfg.group_size
        self.seed, self.device = seed, device
        self._routers = RouterTerms(model, device)

    @property
    def router(self) -> RouterSums:
        return self._routers.sums

    def begin_step(
        self, model: OlmoeForCausalLM, micro_batches: list[Batch], totals: Totals, logged: bool
    ) -> Totals:
        """Replace the prompts of every micro-batch by completions, and count them. Collective."""
        counts_3 = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            columns = self._roll_out(model, batch)
            batch.clear()
            batch.update(columns)
            mask = batch["attention_mask"]
            sizes = (mask.sum(), batch["completion_lengths"].sum(), torch.tensor(mask.numel()))
            counts_3 += torch.stack([size.to(self.device) for size in sizes])
        dist.all_reduce(counts_3)
        self._routers.begin_step(model, micro_batches, logged, partial(self._routing, model))
        tokens, _, positions = map(int, counts_3.tolist())
        return replace(
            totals,
            num_tokens=counts_3[0].float(),
            num_targets=counts_3[1].float(),
            num_tokens_host=tokens,
            num_positions=positions,
            sequences_without_targets=0,
        )

    def _roll_out(self, model: OlmoeForCausalLM, batch: Batch) -> Batch:
        """Sample completions of a micro-batch's prompts; the columns of the training pass."""
        size = self.cfg.group_size
        ids_NS, mask_NS = (batch[name].repeat_interleave(size, 0) for name in ("input_ids", "attention_mask"))
        keys = [(self.seed, at, number) for at in batch["sample_index"].tolist() for number in range(size)]
        draws = Draws(keys, self.cfg.max_new_tokens, self.device)
        found = sample_completions(model, ids_NS, mask_NS, self.cfg.max_new_tokens, draws)
        reward_N = self._rewards(found, batch["answers"].repeat_interleave(size, 0)).to(self.device)
        return {
            **self._laid_out(found, ids_NS, mask_NS),
            "reward": reward_N,
            "advantage": self._advantages(reward_N),
            "deviation": reward_N.view(-1, size).std(1),
        }

    def _rewards(self, found: Completions, answers_NA: Tensor) -> Tensor:
        """fp32 [N], on the CPU."""
        completions = [
            row[:length]
            for row, length in zip(found.tokens_NC.tolist(), found.lengths_N.tolist(), strict=True)
        ]
        answers = [[token for token in row if token != NO_TOKEN] for row in answers_NA.tolist()]
        texts, expected = (self.tokenizer.decode_batch(ids) for ids in (completions, answers))
        return torch.tensor([self.reward(text, answer) for text, answer in zip(texts, expected, strict=True)])

    def _advantages(self, reward_N: Tensor) -> Tensor:
        reward_BG = reward_N.view(-1, self.cfg.group_size)
        advantage_BG = reward_BG - reward_BG.mean(1, keepdim=True)
        if self.cfg.divide_by_std:
            # As in TRL: the sample's deviation, and a constant that keeps a group of equal rewards at 0.
            advantage_BG = advantage_BG / (reward_BG.std(1, keepdim=True) + 1e-4)
        return advantage_BG.flatten()

    def _laid_out(self, found: Completions, ids_NS: Tensor, mask_NS: Tensor) -> Batch:
        """Put prompts with their completions into rows, with what is known of their tokens."""
        prompt, lengths = ids_NS.shape[1], found.lengths_N.tolist()
        tokens_NT = torch.cat([ids_NS, found.tokens_NC], 1).cpu().numpy()
        starts = (prompt - mask_NS.sum(1)).tolist()
        samples = []
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            tokens = tokens_NT[row, start : prompt + length]
            is_target = np.arange(start, prompt + length) >= prompt
            sizes = np.array([len(tokens)])
            samples.append(
                {
                    "tokens": tokens,
                    "is_target": is_target,
                    "lengths": sizes,
                    "document_ids": np.array([row]),
                    "wanted": np.array([True]),
                }
            )
        columns = to_device(self.collate(samples), self.device)
        layers, top_k = len(found.experts_LNTK), found.experts_LNTK.shape[-1]
        experts_LTK = found.experts_LNTK.new_full((layers, columns["input_ids"].numel(), top_k), OWN_CHOICE)
        for row, (at, start, length) in enumerate(
            zip(columns["document_starts"].tolist(), starts, lengths, strict=True)
        ):
            experts = found.experts_LNTK[:, row, start : prompt + length]
            experts_LTK[:, at : at + experts.shape[1]] = experts
        sampled = [found.log_probs_NC[row, :length] for row, length in enumerate(lengths)]
        return {**columns, "experts": experts_LTK, "sampled_log_probs": torch.cat(sampled)}

    def _routing(self, model: OlmoeForCausalLM, batch: Batch) -> AbstractContextManager[list[Tensor]]:
        return replay_routing(model, batch["experts"], self.cfg.routing is RoutingUse.replay)

    def __call__(
        self, model: OlmoeForCausalLM, micro_batch: Batch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with self._routing(model, micro_batch) as agreements:
            log_probs_P, router = target_log_probs(model, micro_batch)
        lengths_N = micro_batch["completion_lengths"]
        sampled_P = micro_batch["sampled_log_probs"]
        advantage_P = micro_batch["advantage"].repeat_interleave(lengths_N, output_size=len(sampled_P))
        loss_P, is_clipped_P = policy_losses(
            log_probs_P, sampled_P, advantage_P, self.cfg.clip_low, self.cfg.clip_high
        )
        loss = self._mean(loss_P, lengths_N)
        terms = {"policy_loss": loss} | self._metrics(micro_batch, is_clipped_P, agreements)
        difference_P = (log_probs_P.detach() - sampled_P).abs()
        terms["rollout/log_prob_difference"] = difference_P.sum() / totals.num_targets
        if self.reference_model is not None:
            kl = self._mean(self._divergence(model, micro_batch, log_probs_P), lengths_N)
            terms["kl"], loss = kl, loss + self.cfg.kl_coef * kl
        loss, router_terms = self._routers.add(loss, router, totals)
        return loss, terms | router_terms

    def _mean(self, value_P: Tensor, lengths_N: Tensor) -> Tensor:
        """Share in the mean over the global batch's completions of each completion's mean over its tokens."""
        sum_N = torch.segment_reduce(value_P, "sum", lengths=lengths_N, unsafe=True)
        return (sum_N / lengths_N).sum() / self.completions

    def _divergence(self, model: OlmoeForCausalLM, batch: Batch, log_probs_P: Tensor) -> Tensor:
        """exp(r - p) - (r - p) - 1 of each token, p and r being its log-probabilities; fp32 [P]."""
        assert self.reference_model is not None
        with torch.no_grad(), self.reference_model(model) as reference, without_dropout(reference):
            reference_P, _ = target_log_probs(reference, batch)
        difference_P = reference_P - log_probs_P
        return difference_P.exp() - difference_P - 1

    @torch.no_grad()
    def _metrics(self, batch: Batch, is_clipped_P: Tensor, agreements: list[Tensor]) -> dict[str, Tensor]:
        same, recorded = torch.stack(agreements).sum(0)
        share = len(batch["reward"]) / self.completions
        return {
            "reward": batch["reward"].sum() / self.completions,
            "reward_std": batch["deviation"].sum() * self.cfg.group_size / self.completions,
            "completions/mean_length": batch["completion_lengths"].sum() / self.completions,
            "clip_ratio/region_mean": self._mean(is_clipped_P.float(), batch["completion_lengths"]),
            "rollout/routing_agreement": share * same / recorded,
        }

    def end_step(self, model: OlmoeForCausalLM, totals: Totals, skipped: Tensor) -> None:
        self._routers.end_step(skipped)

    def validate(
        self, model: OlmoeForCausalLM, data: TrainingData, cfg: EvaluationConfig, with_heartbeat: Heartbeat
    ) -> dict[str, Validation]:
        """Mean reward of greedy completions: eval/SET/loss is its negative, eval/SET/reward."""
        sums_S2 = []
        sources = validation_sources(data)
        for source in sources:
            sums_2 = torch.zeros(2, dtype=torch.float64, device=self.device)
            for on_any_device in with_heartbeat(validation_batches(source, data, cfg, cfg.max_sequences)):
                batch = to_device(on_any_device, self.device)
                found = sample_completions(
                    model, batch["input_ids"], batch["attention_mask"], self.cfg.max_new_tokens, None
                )
                is_real_N = batch["document_ids"] != FILLER
                reward_N = self._rewards(found, batch["answers"]).to(self.device)
                sums_2 += torch.stack([(reward_N * is_real_N).sum(), is_real_N.sum()])
            dist.all_reduce(sums_2)
            sums_S2.append(sums_2)
        names = [source.name for source in sources]
        results = {name: _validation(sums_2) for name, sums_2 in zip(names, sums_S2, strict=True)}
        return results | {VALIDATION: _validation(torch.stack(sums_S2).sum(0))}


def _validation(sums_2: Tensor) -> Validation:
    total, count = sums_2.tolist()
    reward = total / count if count else math.nan
    return Validation({"loss": -reward, "reward": reward}, f"{int(count):,} prompts")


def policy_losses(
    log_probs_P: Tensor, sampled_P: Tensor, advantage_P: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A) of each token.

    Args:
        log_probs_P: Log-probability of the tokens in the training pass, fp32.
        sampled_P: The same when the tokens were sampled, without gradient.
        advantage_P: A.
        clip_low, clip_high: The ratio is clipped to [1 - clip_low, 1 + clip_high].

    Returns:
        (Losses, fp32 [P]; bool [P], whether the token has no gradient because its ratio is clipped).
    """
    ratio_P = (log_probs_P - sampled_P).exp()
    free_P, clipped_P = ratio_P * advantage_P, ratio_P.clamp(1 - clip_low, 1 + clip_high) * advantage_P
    return -torch.minimum(free_P, clipped_P), clipped_P.detach() < free_P.detach()

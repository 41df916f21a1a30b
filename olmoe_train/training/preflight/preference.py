"""Checks of `objective=preference` together with the data, the adapter and the schedule."""

from dataclasses import fields

from olmoe_train.config.adapter import LoraConfig
from olmoe_train.config.choices import Packing, PreferenceKind, Reference, RouterTraining, Strategy
from olmoe_train.config.objective import GrpoConfig, PreferenceConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.manifest import Manifest
from olmoe_train.data.mixture import has_sources, sources_key

USED_BY = {
    "gamma": (PreferenceKind.simpo,),
    "label_smoothing": (PreferenceKind.dpo, PreferenceKind.dpo_norm, PreferenceKind.simpo),
    "sft_weight": tuple(
        kind for kind in PreferenceKind if kind not in (PreferenceKind.orpo, PreferenceKind.kto)
    ),
    "desirable_weight": (PreferenceKind.kto,),
    "undesirable_weight": (PreferenceKind.kto,),
    "ipo_log_probs": (PreferenceKind.ipo,),
}
"""Key of `objective` -> the kinds that read it. Every kind reads the other keys."""


def preference_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with the objective, apart from the data itself; one message per error."""
    packing = f"data.packing={cfg.data.packing.value}"
    if not isinstance(cfg.objective, PreferenceConfig | GrpoConfig):
        if cfg.data.packing is Packing.none:
            return [f"{packing}: is for preferences and grpo; set data.packing=best_fit or concat"]
        return []
    errors, name = [], f"objective={cfg.objective.name}"
    if cfg.data.packing is Packing.concat:
        errors.append(
            f"{packing}: cuts documents, and a completion must stay whole; set data.packing=best_fit "
            "data.mask_documents=true, or data.packing=none"
        )
    if cfg.data.packing is Packing.best_fit and not cfg.data.mask_documents:
        errors.append(
            f"data.mask_documents=false with {packing}: attention would cross the completions of a sequence; "
            "set data.mask_documents=true, or data.packing=none"
        )
    if cfg.data.repetition_filter:
        errors.append(
            f"data.repetition_filter=true: filters the sequences of pretraining; set it to false for {name}"
        )
    in_tokens = {
        "trainer.max_tokens": cfg.trainer.max_tokens,
        "scheduler.warmup_tokens": cfg.scheduler.warmup_tokens,
        "scheduler.decay_tokens": cfg.scheduler.decay_tokens,
        "scheduler.decay_length_tokens": cfg.scheduler.decay_length_tokens,
    }
    errors += [
        f"{key}={value}: a step of {name} has a number of samples, not of tokens; give a length in steps, "
        "epochs or as a fraction"
        for key, value in in_tokens.items()
        if value is not None
    ]
    if isinstance(cfg.objective, GrpoConfig):
        return errors + _grpo_errors(cfg, cfg.objective)
    return errors + _live_errors(cfg, cfg.objective)


def _grpo_errors(cfg: TrainConfig, objective: GrpoConfig) -> list[str]:
    errors = []
    if cfg.parallel.strategy is Strategy.deepspeed:
        errors.append(
            "parallel.strategy=deepspeed: objective=grpo samples from the model, and that engine has only "
            "training passes; set parallel.strategy=fsdp"
        )
    if objective.max_new_tokens >= cfg.data.sequence_length:
        errors.append(
            f"objective.max_new_tokens={objective.max_new_tokens}: must be below data.sequence_length="
            f"{cfg.data.sequence_length}, which has to hold the prompt, too"
        )
    if objective.kl_coef:
        errors += _adapter_off_errors(cfg, f"objective.kl_coef={objective.kl_coef}", "objective.kl_coef=0")
    return errors


def _live_errors(cfg: TrainConfig, objective: PreferenceConfig) -> list[str]:
    if objective.reference_kind is not Reference.live:
        return []
    return _adapter_off_errors(cfg, "objective.reference=live", "objective.reference=cached")


def _adapter_off_errors(cfg: TrainConfig, given: str, instead: str) -> list[str]:
    """The model with its adapter off is the reference only if it is the initial model.

    Args:
        cfg: The configuration of the run.
        given: The key and value for which the run needs a reference model.
        instead: The key and value without that need.
    """
    if not isinstance(cfg.adapter, LoraConfig):
        return []
    reasons = []
    if cfg.adapter.router is RouterTraining.full:
        reasons.append("adapter.router=full changes that model, too")
    if cfg.model.adapter_from is not None:
        reasons.append(f"a run from model.adapter_from={cfg.model.adapter_from} does not start there")
    return [
        f"{given}: the reference is the model with the adapter off, and {reason}; set {instead}"
        for reason in reasons
    ]


def preference_data_errors(cfg: TrainConfig, manifests: dict[str, Manifest]) -> list[str]:
    """Whether the data is what the objective reads, one message per error."""
    errors = []
    for name, manifest in manifests.items():
        where = f"{sources_key(cfg.data)}: {name}" if has_sources(cfg.data) else f"data.dir={cfg.data.dir}"
        preferences = manifest.preferences
        if isinstance(cfg.objective, GrpoConfig) and manifest.targets is None:
            errors.append(
                f"{where} has no answers: every token is a target; prepare prompts with answers, with "
                "data=chat or data.source.records=prompt_completion"
            )
        if not isinstance(cfg.objective, PreferenceConfig):
            if preferences is not None:
                errors.append(f"{where} holds preferences; set objective=preference for it")
            continue
        if preferences is None:
            errors.append(
                f"{where} holds no preferences, which objective=preference needs; prepare some with "
                "data=preference, or set objective=next_token"
            )
            continue
        if not preferences.paired and cfg.objective.kind is not PreferenceKind.kto:
            errors.append(
                f"{where} holds completions with labels, and objective.kind={cfg.objective.kind.value} "
                "compares pairs; set objective.kind=kto"
            )
        if preferences.longest > cfg.data.sequence_length:
            errors.append(
                f"data.sequence_length={cfg.data.sequence_length}: {where} has completions that have "
                f"{preferences.longest} tokens with their prompts; set data.sequence_length="
                f"{preferences.longest}, or prepare the data for shorter sequences"
            )
    return errors


def preference_warnings(cfg: TrainConfig, manifests: dict[str, Manifest]) -> list[str]:
    """Warnings about keys of a valid config without effect for this kind, and about the weights of kto."""
    objective = cfg.objective
    if not isinstance(objective, PreferenceConfig):
        return []
    kind = f"objective.kind={objective.kind.value}"
    defaults = {field.name: field.default for field in fields(PreferenceConfig)}
    warnings = [
        f"objective.{key} has no effect with {kind}"
        for key, kinds in USED_BY.items()
        if objective.kind not in kinds and getattr(objective, key) != defaults[key]
    ]
    if objective.logprobs_dir is not None and objective.reference_kind is not Reference.cached:
        warnings.append(
            f"objective.logprobs_dir has no effect: objective.reference is {objective.reference_kind.value}"
        )
    if objective.kind is PreferenceKind.kto:
        warnings += _kto_weights(objective, manifests)
    return warnings


def _kto_weights(objective: PreferenceConfig, manifests: dict[str, Manifest]) -> list[str]:
    """KTO, equation 9 of arXiv 2402.01306: lambda_D n_D / (lambda_U n_U) should be in [1, 4/3]."""
    wanted = documents = 0
    for manifest in manifests.values():
        assert manifest.preferences is not None, "preference_data_errors refuses this"
        wanted += manifest.preferences.desirable
        documents += manifest.train.documents + manifest.validation.documents
    unwanted = documents - wanted
    if not wanted or not unwanted or not objective.undesirable_weight:
        return []
    ratio = objective.desirable_weight * wanted / (objective.undesirable_weight * unwanted)
    if 1 <= ratio <= 4 / 3:
        return []
    low, high = (factor * objective.undesirable_weight * unwanted / wanted for factor in (1, 4 / 3))
    return [
        (
            f"objective.desirable_weight={objective.desirable_weight:g}: {wanted:,} completions of the data "
            f"are wanted and {unwanted:,} are not; the authors of KTO recommend {low:.3g} to {high:.3g} then"
        )
    ]

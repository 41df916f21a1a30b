"""Checks of evaluation.prompts: the layout, and the prompts' lengths in tokens."""

from olmoe_train.config.choices import Strategy
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.mixture import mixture_components
from olmoe_train.data.tokenizer import check_vocabulary, load_tokenizer
from olmoe_train.utils.errors import UserError


def sampling_errors(cfg: TrainConfig) -> list[str]:
    """What keeps a run from continuing evaluation.prompts, one message per error."""
    evaluation = cfg.evaluation
    if not evaluation.prompts:
        return []
    if cfg.parallel.strategy is Strategy.deepspeed:
        return [
            (
                f"evaluation.prompts: has {len(evaluation.prompts)} prompts to continue, and with "
                "parallel.strategy=deepspeed the engine has only training passes; set parallel.strategy="
                "fsdp, or evaluation.prompts=[]"
            )
        ]
    directory = mixture_components(cfg.data)[0].directory / "tokenizer"
    try:
        tokenizer = load_tokenizer(directory)
    except UserError as error:
        return [f"evaluation.prompts: {error}"]
    errors, longest = [], cfg.model.max_position_embeddings
    for index, prompt in enumerate(evaluation.prompts):
        key, ids = f"evaluation.prompts[{index}]", tokenizer.encode(prompt).ids
        if not ids:
            errors.append(f"{key}: is empty; give some text to continue")
            continue
        try:
            check_vocabulary(ids, cfg.model.vocab_size, directory)
        except UserError as error:
            errors.append(f"{key}: {error}")
        if len(ids) + evaluation.sample_tokens > longest:
            errors.append(
                f"{key}: the prompt ({len(ids)} tokens) and evaluation.sample_tokens="
                f"{evaluation.sample_tokens} together exceed model.max_position_embeddings={longest}; "
                "shorten the prompt, or lower evaluation.sample_tokens"
            )
    return errors

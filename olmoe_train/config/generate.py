"""The options of `olmoe generate`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from olmoe_train.config.choices import StripPrefix, Weights


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt or a file of prompts, or talk, with a Hugging Face directory or the newest checkpoint
    of a run."""

    source: str = MISSING
    """HF directory, run directory (its newest checkpoint), or original OLMo checkpoint."""
    prompt: str | None = None
    """Text to continue. With chat=true: the user's first message; null: it is read, as all others are."""
    max_new_tokens: int | None = None
    """Greatest number of tokens to generate; with chat=true, per answer. null: 64, with chat=true 1024. A
    record of `prompts` may have its own."""
    temperature: float = 0.0
    """Temperature of the softmax to sample from; 0: always take the most probable token."""
    top_k: int | None = None
    """Sample only from the k most probable tokens; null: no limit."""
    top_p: float | None = None
    """Sample only from the smallest set of tokens whose probabilities sum to top_p; null: no limit."""
    seed: int = 0
    """Seed of the sampling."""
    chat: bool = False
    """Hold a conversation, with the chat template of the model. Each line of the input is a message of the
    user, and the answers are printed. In a terminal, /help lists commands."""
    system: str | None = None
    """The system message of the conversation; null: none but what the chat template has itself."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, as apply_chat_template of Transformers takes them: {enable_thinking:
    false}. They should be those that the model was trained with."""
    prompts: str | None = None
    """File of JSON lines to continue, also .gz or .zst. A record has prompt, a text, or messages, which the
    chat template renders; with chat=true a prompt is the user's message. It may have max_new_tokens, and any
    other field."""
    out: str | None = None
    """File to write the records of `prompts` to, in their order, with completion, tokens (how many) and
    finish_reason (stop or length). If it has records already, the others are added. null: stdout."""
    batch_size: int = 16
    """Most records of `prompts` that are decoded together. A record that ends makes place for the next."""
    max_batch_tokens: int = 16384
    """Limit of the key/value cache of `prompts`, in tokens: records that are decoded together, times the
    longest of them with its max_new_tokens. OLMoE-1B-7B takes 128 KiB per token in bf16."""
    trust_pickle: bool = False
    """Read weights from a pickle (pytorch_model.bin, or OLMo's model.pt) with
    torch.load(weights_only=True)."""
    strip_prefix: StripPrefix = StripPrefix.none
    """auto: take the prefixes of wrappers, _orig_mod. (torch.compile) and module. (DDP), off the names of the
    tensors."""
    which: Weights = Weights.weights
    """Of a run. weights: the weights. ema: their average, which a run with trainer.ema_decay keeps."""

"""OlmoeConfig: the architecture of a model, with the fields that the config.json of an OLMoE checkpoint has.

Names and defaults are those of Transformers 5.23 (`models/olmoe/configuration_olmoe.py`). Older spellings
that occur on the hub are read, too. Fields that this package does not know are kept and written back.

Sizes: vocab_size V, hidden_size D, intermediate_size F (of one expert), num_hidden_layers L, num_experts E,
num_experts_per_tok K, num_attention_heads N, num_key_value_heads M, head_dim H = D / N.

Six more fields are design choices that Transformers' OLMoE does not have (ablations.py). An exported
config.json has none of them.
"""

import copy
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from olmoe_train.model.ablations import ABLATIONS, ablation_problems, refuse_export, routing_problems
from olmoe_train.model.rope_parameters import ROPE_TYPES, ROPE_TYPES_WITH_ORIGINAL_LENGTH, rope_problems
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import read_json_object

if TYPE_CHECKING:
    import torch

DEFAULT_ROPE_THETA = 10000.0

_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "num_experts",
    "num_experts_per_tok",
)
_NUMBERS = ("rms_norm_eps", "initializer_range", "attention_dropout", "router_aux_loss_coef")
_FLAGS = (
    "use_cache",
    "tie_word_embeddings",
    "attention_bias",
    "norm_topk_prob",
    "output_router_logits",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "qk_norm",
)


@dataclass(init=False)
class OlmoeConfig:
    """The architecture of an OLMoE, with every documented field of Transformers' OlmoeConfig.

    The default `intermediate_size` of 2048 is Transformers' default. The experts of the released
    OLMoE-1B-7B are 1024 wide.

    Args:
        **values: Fields by name. `num_key_value_heads=None` means `num_attention_heads`, and
            `rope_parameters=None` means plain RoPE with theta 10,000. `num_local_experts` and the hub's
            older `rope_theta`, `rope_scaling` (with `type`) and `torch_dtype` are accepted, too. Unknown
            names become attributes, and `to_dict` writes them back.

    Raises:
        UserError: Values are invalid; the message lists all of them, with the fix.
    """

    model_type: ClassVar[str] = "olmoe"

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = None  # type: ignore[assignment]  # filled in by __init__
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50279
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # filled in by __init__
    attention_bias: bool = False
    attention_dropout: float = 0.0
    clip_qkv: float | None = None
    num_experts_per_tok: int = 8
    num_experts: int = 64
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01
    norm_topk_prob: bool = False
    # Fields that Transformers does not have:
    num_shared_experts: int = 0
    routing: str = "token_choice"
    expert_capacity: float | None = None
    qk_norm: bool = True
    norm: str = "rms"
    initialization: str = "truncated_normal"
    # Fields that every configuration of Transformers has:
    architectures: list[str] | None = None
    dtype: "torch.dtype | None" = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    # Not a field of the file: everything in the file that is not one of the fields above.
    extra: dict[str, Any] = field(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        values = _with_current_names(values)
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values.get("num_attention_heads", OlmoeConfig.num_attention_heads)
        _complete_rope(values)
        for item in fields(self):
            if item.name != "extra":
                setattr(self, item.name, values.pop(item.name, item.default))
        self.extra = values
        self.validate()

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name not in extra:
            raise AttributeError(f"OlmoeConfig has no field {name!r}")
        return extra[name]

    @property
    def head_dim(self) -> int:
        """Width of one attention head (H)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_width(self) -> int:
        """Width of all query heads together, and of the attention's output."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of all key heads together, and of all value heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_local_experts(self) -> int:
        """Another name of num_experts in Transformers."""
        return self.num_experts

    @num_local_experts.setter
    def num_local_experts(self, value: int) -> None:
        self.num_experts = value

    @property
    def experts_per_token(self) -> float:
        """Routed experts that process a token: K; with expert choice the capacity, which is a mean."""
        if self.routing == "token_choice":
            return self.num_experts_per_tok
        return self.num_experts_per_tok if self.expert_capacity is None else self.expert_capacity

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared experts together; 0: there are none."""
        return self.num_shared_experts * self.intermediate_size

    @property
    def ablations(self) -> dict[str, Any]:
        """The fields of ABLATIONS in which the model is not as released, with their values."""
        defaults = {item.name: item.default for item in fields(self)}
        return {name: getattr(self, name) for name in ABLATIONS if getattr(self, name) != defaults[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> Self:
        """Build a configuration from the content of a config.json.

        Args:
            values: Fields by name.
            **overrides: Fields that replace those in `values`.

        Raises:
            UserError: Values are invalid; the message lists all of them.
        """
        return cls(**{**values, **overrides})

    @classmethod
    def from_pretrained(cls, directory: str | Path, **overrides: Any) -> Self:
        """Read a config.json.

        Args:
            directory: A directory with a config.json, or the path of such a file.
            **overrides: Fields that replace those in the file.

        Raises:
            UserError: The file cannot be read, or values are invalid; the message names the file.
        """
        path = Path(directory)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = read_json_object(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); give a directory that has a config.json"
            ) from None
        try:
            return cls.from_dict(values, **overrides)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, in JSON types: names of Transformers 5, unknown fields included.

        Of the fields that Transformers does not have, `ablations`. Trained weights do not depend on their
        initialization, so it is left out.
        """
        left_out = {"extra", "initialization", *ABLATIONS} - self.ablations.keys()
        known = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in left_out}
        known["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return copy.deepcopy({**self.extra, **known, "model_type": self.model_type})

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a config.json.

        The fields `rope_theta` and `torch_dtype`, which older readers look for, are written beside the
        current ones.

        Args:
            directory: The directory to write to, which is created if it does not exist.

        Raises:
            UserError: Transformers cannot represent the model.
        """
        refuse_export(self.ablations)
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        values = self.to_dict()
        values["rope_theta"] = self.rope_parameters["rope_theta"]
        if self.dtype is not None:
            values["torch_dtype"] = values["dtype"]
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (path / "config.json").write_text(text, encoding="utf-8")

    def validate(self) -> None:
        """Check all fields.

        Raises:
            UserError: Values are invalid; the message lists all of them, with the fix.
        """
        problems = _field_problems(self)
        # Relations between fields are checked only if each field is valid by itself.
        problems = problems or _relation_problems(self) + rope_problems(self.rope_parameters, self.head_dim)
        if problems:
            raise UserError("invalid OlmoeConfig: " + "; ".join(problems))


def _with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of `values` in which names from before Transformers 5 are replaced by the current ones."""
    values = copy.deepcopy(values)
    model_type = values.pop("model_type", None)
    if model_type not in (None, OlmoeConfig.model_type):
        raise UserError(f"model_type is {model_type!r}, but only {OlmoeConfig.model_type!r} is supported")
    old_dtype = values.pop("torch_dtype", None)
    values["dtype"] = _dtype(values.get("dtype") or old_dtype)
    if "num_local_experts" in values:
        experts = values.pop("num_local_experts")
        if values.setdefault("num_experts", experts) != experts:
            raise UserError(f"num_local_experts={experts} contradicts num_experts={values['num_experts']}")
    rope = values.pop("rope_scaling", None) or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters={rope!r} must be an object with rope_type and rope_theta")
    for name in ("rope_theta", "partial_rotary_factor"):
        outside = values.pop(name, None)
        if rope.get(name) is None and outside is not None:
            rope[name] = outside
    values["rope_parameters"] = rope
    return values


def _dtype(value: Any) -> "torch.dtype | None":
    """A torch dtype from its name ("bfloat16", "torch.bfloat16") or from itself."""
    if value is None:
        return None
    import torch  # here: a model's sizes are read and checked without torch

    if isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype={value!r} is not a torch dtype; write float32, bfloat16 or float16")
    return dtype


def _complete_rope(values: dict[str, Any]) -> None:
    """Add the missing keys of rope_parameters, in place: type, theta and, for types that need it, the
    pretraining length."""
    rope = values["rope_parameters"]
    old_type = rope.pop("type", None)
    if rope.get("rope_type") is None:
        rope["rope_type"] = old_type or "default"
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = DEFAULT_ROPE_THETA
    if rope["rope_type"] in ROPE_TYPES_WITH_ORIGINAL_LENGTH:
        name = "original_max_position_embeddings"
        longest = values.get("max_position_embeddings", OlmoeConfig.max_position_embeddings)
        # A value beside rope_parameters takes precedence over one inside: Transformers' rule, for Phi-3.
        rope[name] = values.get(name) or rope.get(name) or longest


def _field_problems(config: OlmoeConfig) -> list[str]:
    """One message for each field whose value is invalid by itself."""
    from olmoe_train.model.activations import ACTIVATIONS  # here: it imports torch

    problems = []
    for name in _POSITIVE_INTEGERS:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            problems.append(f"{name}={value!r} must be an integer of at least 1")
    for name in _NUMBERS:
        value = getattr(config, name)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            problems.append(f"{name}={value!r} must be a number of at least 0")
    for name in _FLAGS:
        if type(getattr(config, name)) is not bool:
            problems.append(f"{name}={getattr(config, name)!r} must be true or false")
    problems += ablation_problems(vars(config))
    if config.hidden_act not in ACTIVATIONS:
        problems.append(f"hidden_act={config.hidden_act!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
    clip = config.clip_qkv
    if clip is not None and (type(clip) not in (int, float) or not clip > 0):
        problems.append(f"clip_qkv={clip!r} must be a number above 0, or null for no clipping")
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        problems.append(f"rope_parameters.rope_type={kind!r} is unknown; choose from {', '.join(ROPE_TYPES)}")
    return problems


def _relation_problems(config: OlmoeConfig) -> list[str]:
    """One message for each contradiction between two fields."""
    problems = []
    heads, width = config.num_attention_heads, config.hidden_size
    key_value_heads, top_k = config.num_key_value_heads, config.num_experts_per_tok
    if width % heads:
        problems.append(f"hidden_size={width} is not divisible by num_attention_heads={heads}; change either")
    elif config.head_dim % 2:
        problems.append(
            f"hidden_size={width} / num_attention_heads={heads} gives heads of width {config.head_dim}, and "
            "RoPE rotates pairs of channels; make the width even"
        )
    stated = config.extra.get("head_dim")
    if stated is not None and stated * heads != width:
        problems.append(
            f"head_dim={stated} must be hidden_size={width} / num_attention_heads={heads}: OLMoE supports no "
            "other head width; remove head_dim"
        )
    if heads % key_value_heads:
        problems.append(
            f"num_attention_heads={heads} is not divisible by num_key_value_heads={key_value_heads}; change "
            "either"
        )
    if top_k > config.num_experts:
        problems.append(
            f"num_experts_per_tok={top_k} is more than num_experts={config.num_experts}; lower it"
        )
    problems += routing_problems(vars(config))
    if config.attention_dropout >= 1:
        problems.append(f"attention_dropout={config.attention_dropout} must be below 1")
    pad = config.pad_token_id
    if pad is not None and (type(pad) is not int or not 0 <= pad < config.vocab_size):
        problems.append(f"pad_token_id={pad!r} must be null or a token below vocab_size={config.vocab_size}")
    return problems

"""The models that benchmarks/gpu_step.py and on_gpu.py compare, upon the same parameters."""

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from olmoe_train.distributed.compile import compile_layers
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.losses import router_losses_from_stats
from olmoe_train.planning.flops import parameter_counts

RELEASED_LAYERS = 16
STATE_BYTES = 8  # a parameter: weight, gradient and two moments in bf16
RESERVE = 3 * 2**30  # CUDA's context, the allocator's fragments
Loss = Callable[[Tensor], Tensor]


def fields(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden,
        "intermediate_size": args.width,
        "num_hidden_layers": layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "num_experts": args.experts,
        "num_experts_per_tok": args.top_k,
        "max_position_embeddings": args.sequence,
        "pad_token_id": 1,
        "eos_token_id": 0,
    }


# --- the models -------------------------------------------------------------------------------------------


def build(args: argparse.Namespace, layers: int, dtype: torch.dtype = torch.bfloat16) -> OlmoeForCausalLM:
    """Random weights, drawn on the device: 7 billion of the CPU's would take minutes."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(**fields(args, layers))).to(dtype)
    model.to_empty(device=args.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    return model.train()


def transformers_twin(
    ours: OlmoeForCausalLM, args: argparse.Namespace, experts: str = "grouped_mm"
) -> Any | None:
    """Transformers' model upon the very parameters of ours; None where there is no transformers."""
    try:
        import transformers
    except ImportError:
        return None
    config = transformers.OlmoeConfig(**fields(args, ours.config.num_hidden_layers))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        theirs = transformers.OlmoeForCausalLM(config)
    theirs.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(config=config).to(args.device)  # its buffers were on meta
    theirs.set_experts_implementation(experts)
    return theirs.train()


def build_compiled(args: argparse.Namespace, model: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """A second model upon the same parameters, its elementwise parts compiled."""
    with torch.device("meta"):
        compiled = OlmoeForCausalLM(model.config)
    compiled.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    compile_layers(compiled)
    return compiled.train()


def our_loss(model: OlmoeForCausalLM, backend: str, router: bool = True) -> Loss:
    def loss(ids_BS: Tensor) -> Tensor:
        model.set_experts_backend(backend)
        output = model.training_forward(ids_BS, ids_BS)
        ce_loss = output.ce_sum / (ids_BS.shape[0] * (ids_BS.shape[1] - 1))
        if not router:
            return ce_loss
        balance, z = router_losses_from_stats(output.router, model.config.num_experts_per_tok)
        return ce_loss + 0.01 * balance + 0.001 * z

    return loss


def their_loss(model: Any, router: bool = True) -> Loss:
    """Without a z-loss, which they do not have."""

    def loss(ids_BS: Tensor) -> Tensor:
        return model(input_ids=ids_BS, labels=ids_BS, use_cache=False, output_router_logits=router).loss

    return loss


@contextmanager
def layers_of(model: Any, count: int) -> Iterator[None]:
    """The model cut to its first `count` layers."""
    whole = model.model.layers
    model.model.layers = whole[:count]
    try:
        yield
    finally:
        model.model.layers = whole


def free_memory(args: argparse.Namespace) -> None:
    gc.collect()
    if args.device != "cpu":
        torch.cuda.empty_cache()


def fitting_layers(args: argparse.Namespace) -> int:
    """Of 16, those whose state and activations fit; what Transformers keeps is the most: about 2 bytes x
    (8 (2 D + 5 F) + 12 D) a token and layer."""
    if args.layers is not None or args.device == "cpu":
        return args.layers or RELEASED_LAYERS
    free_memory(args)  # of what was there for check_parity
    tokens = args.micro_batch * args.sequence
    free = torch.cuda.mem_get_info()[0] - RESERVE
    counts = [parameter_counts(OlmoeConfig(**fields(args, layers))).total for layers in (1, 2)]
    kept = 2 * tokens * (args.top_k * (2 * args.hidden + 5 * args.width) + 12 * args.hidden)
    layer = STATE_BYTES * (counts[1] - counts[0]) + kept
    rest = STATE_BYTES * (2 * counts[0] - counts[1]) + 12 * tokens * args.vocabulary
    return max(1, min(RELEASED_LAYERS, int((free - rest) // layer)))


def random_ids(args: argparse.Namespace, sequences: int) -> Tensor:
    return torch.randint(2, args.vocabulary, (sequences, args.sequence), device=args.device)


# --- is it right? -----------------------------------------------------------------------------------------


def loss_and_gradients(model: nn.Module, loss: Loss, ids_BS: Tensor) -> tuple[float, dict[str, Tensor]]:
    value = loss(ids_BS)
    value.backward()
    gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    return value.item(), gradients


@dataclass(frozen=True)
class Parity:
    """How far a variant in bf16 is off Transformers in fp32, relative."""

    name: str
    loss: float
    gradients: dict[str, float]
    """By parameter."""
    tolerances: dict[str, float]
    """Of the gradients: 1.5 times what Transformers in bf16 is off, and 0.01."""

    @property
    def beyond(self) -> list[str]:
        """Parameters whose gradient is too far off."""
        return [name for name, error in self.gradients.items() if not error <= self.tolerances[name]]

    @property
    def passed(self) -> bool:
        """The loss may be off by 1e-3 of it."""
        return self.loss <= 1e-3 and not self.beyond


def parity(args: argparse.Namespace) -> list[Parity] | None:
    """Two layers, one sequence: each backend, and Transformers in bf16, which comes last. None where there is
    no transformers."""
    ours = build(args, min(2, args.layers or 2))
    twin = transformers_twin(ours, args)
    if twin is None:
        return None
    ids_BS = random_ids(args, 1)
    losses = {f"ours, {name}": our_loss(ours, name, router=False) for name in args.backends}
    losses["transformers"] = their_loss(twin, router=False)
    results = {name: loss_and_gradients(ours, loss, ids_BS) for name, loss in losses.items()}
    ours.float()  # in place: the bf16 results are copies
    twin = transformers_twin(ours, args, experts="eager")  # one by one, in any dtype
    assert twin is not None
    exact, reference = loss_and_gradients(twin, their_loss(twin, router=False), ids_BS)
    errors = {
        name: {key: off(gradients[key], value) for key, value in reference.items()}
        for name, (_, gradients) in results.items()
    }
    tolerances = {key: 1.5 * error + 0.01 for key, error in errors["transformers"].items()}
    return [
        Parity(name, abs(loss - exact) / exact, errors[name], tolerances)
        for name, (loss, _) in results.items()
    ]


def check_parity(args: argparse.Namespace) -> bool:
    """Print `parity`, and return whether all passed; true where there is nothing to compare with."""
    found = parity(args)
    if found is None:
        print("parity: not checked, transformers is not installed")
        return True
    for each in found:
        verdict = "passed" if each.passed else f"FAILED {each.beyond}"
        worst = max(each.gradients.values())
        print(f"parity: {each.name}: loss {each.loss:.1e} off fp32, gradients at most {worst:.1e}: {verdict}")
    return all(each.passed for each in found)


def off(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()

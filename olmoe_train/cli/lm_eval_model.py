"""lm-evaluation-harness on models of this package: the model type `olmoe` of lm-eval, and its command line.

    python -m olmoe_train.cli.lm_eval_model --model olmoe --model_args source=RUN --tasks arc_easy,piqa

takes the arguments of `lm-eval`. Versions of lm-eval that look for the entry points `lm_eval.models` know
`--model olmoe` themselves.

Shapes: N requests, P target tokens of a pass, D hidden features, B rows, S tokens of the longest prompt.
"""

import datetime
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import load_whole, open_stored_model, split_step
from olmoe_train.config.choices import Precision
from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.chat_template import TemplateError, open_template
from olmoe_train.data.tokenizer import check_vocabulary, load_tokenizer, read_tokenizer_files
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.evaluation.tasks.log_likelihoods import Packs, log_likelihoods
from olmoe_train.evaluation.tasks.prefix_packs import PrefixPack
from olmoe_train.evaluation.tasks.requests import Request, encode_pairs
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.cross_entropy import HEAD_CHUNK_ROWS
from olmoe_train.model.generation import refuse_expert_choice, stop_tokens, stream_tokens
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"this needs lm-eval ({error}): pip install 'olmoe-train[lm-eval]'") from error

MAX_GEN_TOKS = 256
"""Longest continuation of `generate_until` in tokens if a task does not say it, as with lm-eval's `hf`."""
AUTO_BATCH_SIZE = 16
"""Rows of a batch of `generate_until` with batch_size=auto."""
_SAMPLING = ("temperature", "top_k", "top_p")
_KNOWN_OPTIONS = {"until", "max_gen_toks", "do_sample", *_SAMPLING}


def main() -> int:
    """Run lm-eval's command line, where `--model olmoe` is known. Returns the exit code."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    # Imported by its name, so that one class is registered, and not a second one of the module __main__.
    from olmoe_train.cli import lm_eval_model

    sys.exit(lm_eval_model.main())


@register_model("olmoe")
class OlmoeLM(LM):
    """A whole model on one device, as lm-eval asks it."""

    def __init__(
        self,
        source: str,
        precision: str | None = None,
        device: str = "auto",
        tokens_per_pass: int = EvaluationConfig.tokens_per_pass,
        trust_pickle: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a model.

        Args:
            source: A run directory, a Hugging Face directory or an OLMo checkpoint; RUN@STEP names a
                checkpoint of a run other than its newest one.
            precision: "fp32" or "bf16". None: as stored; a run stores fp32.
            device: "auto", "cpu", "cuda" or "cuda:INDEX".
            tokens_per_pass: Greatest number of tokens of a forward pass of log-likelihoods.
            trust_pickle: Accept weights in a pickle, through torch.load(weights_only=True).
            batch_size: Prompts that are continued together, or "auto". Log-likelihoods do not depend on it.
            max_batch_size: Not used; lm-eval gives it to every model.

        Raises:
            UserError: There is no such model, or an argument has no such value.
        """
        super().__init__()
        name, step = split_step(str(source))
        stored = open_stored_model(name, step or "latest", trust_pickle)
        refuse_expert_choice(stored.config)
        if precision is not None:
            stored.config.dtype = _precision(precision).dtype
        self._device = _device(device)
        self.model = load_whole(stored, self._device)
        self.tokenizer = load_tokenizer(stored.tokenizer)
        self.tokens_per_pass = tokens_per_pass
        self.batch_size = AUTO_BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self._directory = stored.tokenizer
        self._files = read_tokenizer_files(stored.tokenizer, origin=str(stored.tokenizer))

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._files.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without a context: the beginning-of-text token, else the end-of-text token."""
        bos = self._files.special_tokens.get("bos_token")
        found = None if bos is None else self.tokenizer.token_to_id(bos)
        return self.eot_token_id if found is None else found

    def tok_encode(self, string: str) -> list[int]:
        """The tokens of a text, without special tokens around it."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False).ids
        if ids:
            check_vocabulary(ids, self.model.config.vocab_size, self._directory)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Log-likelihood of the continuation in nats, whether greedy decoding would write it) per request.

        Raises:
            UserError: A continuation has no tokens or more than the model reads.
        """
        pairs = [one.args for one in requests]
        encoded = encode_pairs(pairs, self.tokenizer, self.prefix_token_id, joint=True)
        for (_, continuation), one in zip(pairs, encoded, strict=True):
            if not 0 < one.targets <= self.max_length:
                raise UserError(
                    f"the continuation {continuation[:100]!r} has {one.targets} tokens, and the model reads "
                    f"1 to {self.max_length}: leave it out of the task"
                )
            check_vocabulary([int(one.tokens.max())], self.model.config.vocab_size, self._directory)
        # The last token is only predicted, so the model reads one token less.
        cut = [Request(one.tokens[-(self.max_length + 1) :], one.targets) for one in encoded]
        return self._answers(cut, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats, in windows of the model's length."""
        windows, texts = [], []
        for number, one in enumerate(requests):
            tokens = self.tok_encode(one.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, targets = make_disjoint_window(window)
                windows.append(Request(np.array(context + targets, np.int32), len(targets)))
                texts.append(number)
        sums = [0.0] * len(requests)
        for number, (of_window, _) in zip(texts, self._answers(windows, disable_tqdm), strict=True):
            sums[number] += of_window
        return sums

    def _answers(self, requests: Sequence[Request], is_quiet: bool) -> list[tuple[float, bool]]:
        """(Log-likelihood, whether each target is the most likely token) of each request."""
        packs: list[PrefixPack] = []

        def shown(all_packs: Packs) -> Packs:
            for pack in tqdm(all_packs, desc="Passes", disable=is_quiet):
                packs.append(pack)
                yield pack

        with _most_likely(self.model) as hits:
            sums_N = log_likelihoods(self.model, requests, self.tokens_per_pass, self._device, shown)
        if not sums_N.isfinite().all():
            raise UserError(
                "a log-likelihood is not finite: the weights are damaged, or "
                f"{self.model.config.dtype} cannot hold what the model computes"
            )
        greedy_N = [False] * len(requests)
        for pack, hit_P in zip(packs, hits, strict=True):
            of_requests = hit_P.split([len(targets) for targets in pack.targets])
            for number, hit in zip(pack.requests, of_requests, strict=True):
                greedy_N[number] = bool(hit.all())
        return list(zip(sums_N.tolist(), greedy_N, strict=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop string, the end of text or max_gen_toks.

        Raises:
            UserError: An option is not supported, or max_gen_toks leaves no room for a context.
        """
        prompts = [(self.tok_encode(one.args[0]) or [self.prefix_token_id]) for one in requests]
        written = [""] * len(requests)
        # Prompts with the same options are continued together, of similar lengths, the longest first.
        order = sorted(range(len(requests)), key=lambda n: (repr(requests[n].args[1]), -len(prompts[n])))
        bar = tqdm(total=len(requests), desc="Continuations", disable=disable_tqdm)
        for _, alike in groupby(order, key=lambda n: repr(requests[n].args[1])):
            numbers = list(alike)
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                texts = self._continue([prompts[n] for n in batch], requests[batch[0]].args[1])
                for number, text in zip(batch, texts, strict=True):
                    written[number] = text
                bar.update(len(batch))
        bar.close()
        return written

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Continue prompts with the options of a task."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        if refused := {name: given[name] for name in given.keys() - _KNOWN_OPTIONS}:
            raise UserError(f"generation_kwargs {refused}: not supported; leave them out")
        room = self.max_length - given["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"max_gen_toks={given['max_gen_toks']}: must be less than the "
                f"model's length, {self.max_length}"
            )
        ids_BS, mask_BS = _left_padded([prompt[-room:] for prompt in prompts], self._device)
        sampling = {name: given[name] for name in _SAMPLING if given.get("do_sample") and name in given}
        ends = {self.eot_token_id, *stop_tokens(self.model)}
        rows: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for token_B in stream_tokens(
            self.model, ids_BS, given["max_gen_toks"], mask_BS, **sampling, eos_token_id=sorted(ends)
        ):
            for row, token in enumerate(token_B.tolist()):
                if ended[row]:
                    continue
                rows[row].append(token)
                ended[row] = token in ends or self._has_stop(rows[row], given["until"])
            if all(ended):
                break
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [postprocess_generated_text(text, given["until"], None) for text in texts]

    def _has_stop(self, tokens: list[int], stops: list[str]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(stop and stop in text for stop in stops)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells apart its cached requests by."""
        return self._files.sha256

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's chat template; "" without one, or if `chat_template` is false."""
        return (self._files.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages. Without a generation prompt, the text ends where the last message's content ends.

        Raises:
            UserError: The model has no chat template, or the template refuses the messages.
        """
        if self._files.chat_template is None:
            raise UserError(f"{self._directory}: no chat template: leave out --apply_chat_template")
        template = open_template(
            self._files.chat_template,
            self._files.special_tokens,
            datetime.date.today().isoformat(),
            f"the chat template of {self._directory}",
        )
        try:
            text = template.render(chat_history, add_generation_prompt)
        except TemplateError as error:
            raise UserError(f"{self._directory}: {error}") from None
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]


def _precision(value: str) -> Precision:
    try:
        return Precision(value)
    except ValueError:
        raise UserError(f"precision={value}: give fp32 or bf16") from None


def _device(value: str) -> torch.device:
    kind, _, index = value.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdecimal()):
        raise UserError(f"device={value}: give auto, cpu, cuda or cuda:INDEX")
    device = resolve_device(kind, "device")
    return torch.device(device.type, int(index)) if index else device


@contextmanager
def _most_likely(model: OlmoeForCausalLM) -> Iterator[list[Tensor]]:
    """Yields a list that gets one tensor per pass: whether each target is the most likely token, bool [P], on
    the CPU."""
    found: list[Tensor] = []

    def compare(head: torch.nn.Module, inputs: tuple[Tensor], options: dict[str, Tensor]) -> None:
        weight_VD = model.lm_head.weight
        chunks = inputs[0].split(HEAD_CHUNK_ROWS)
        best_P = torch.cat([F.linear(x_CD, weight_VD).argmax(-1) for x_CD in chunks])
        found.append((best_P == options["targets_P"]).cpu())

    hook = model.lm_head.register_forward_pre_hook(compare, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts, int64 [B, S], and their mask, int64 [B, S], 0 at padding."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

"""Weights from other hands, through every verb that reads weights: names with prefixes of wrappers, values
that are not finite, quantization, and a dtype that is not the files'."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from olmoe_train.checkpoint.convert.stored_model import load_into, open_stored_model
from olmoe_train.cli.evaluate import main as evaluate
from olmoe_train.cli.export import main as export
from olmoe_train.cli.generate import main as generate
from olmoe_train.cli.upcycle import main as upcycle
from olmoe_train.config.choices import ExportFormat, Precision, StripPrefix
from olmoe_train.config.data import DataConfig
from olmoe_train.config.generate import GenerateConfig
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import ParallelConfig
from olmoe_train.config.verbs import EvaluateConfig, ExportConfig, UpcycleConfig
from olmoe_train.data.tokenizer import load_tokenizer, train_tokenizer
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.train import train
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.finite import first_not_finite
from tests.support.data import EOS, write_prepared
from tests.support.faults import config, metrics, write_data
from tests.support.hf_directories import assert_same, edit_json, edit_tensors, make, tensors_of

VOCABULARY = 320  # 256 bytes, eos, padding, and some merges
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A dense model, which `olmoe upcycle` reads, too. Beside it, prepared data."""
    write_prepared(tmp_path / "data", [[3, 4]], [[5, 6, 7]], vocab_size=VOCABULARY)
    train_tokenizer(iter(["def main(argument): return argument\n"] * 20), VOCABULARY).save(tmp_path / "hf")
    dense = {"num_experts": 1, "num_experts_per_tok": 1}
    make(vocab_size=VOCABULARY, eos_token_id=EOS, **dense).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def verbs(source: Path, **options: Any) -> dict[str, Callable[[], object]]:
    """Every verb that reads the weights of `source`, and the initialization of a training run from them."""
    name, out = str(source), source.parent
    data = DataConfig(str(out / "data"), sequence_length=4)
    strip = options.get("strip_prefix") is StripPrefix.auto
    return {
        "generate": lambda: generate(GenerateConfig(name, "def", max_new_tokens=2, **options)),
        "evaluate": lambda: evaluate(EvaluateConfig([name], data, **options)),
        "export": lambda: export(ExportConfig(name, out=str(out / "exported"), **options)),
        "export to OLMo": lambda: export(
            ExportConfig(name, out=str(out / "olmo"), format=ExportFormat.olmo, **options)
        ),
        "upcycle": lambda: upcycle(UpcycleConfig(name, str(out / "moe"), 4, 2, **options)),
        "init_from": lambda: load_into(
            OlmoeForCausalLM(open_stored_model(source, strip_prefix=strip).config), source, strip_prefix=strip
        ),
    }


def assert_each_refuses(source: Path, message: str) -> None:
    for verb, run in verbs(source).items():
        with pytest.raises(UserError, match=message) as caught:
            run()
        assert len(str(caught.value).splitlines()) == 1, verb


# --- prefixes ---------------------------------------------------------------------------------------------


def compiled(model: OlmoeForCausalLM) -> nn.Module:
    module: Any = torch.compile(model)
    return module


def compiled_layers(model: OlmoeForCausalLM) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    return model


# DataParallel keeps the model where DistributedDataParallel does, and needs no process group.
WRAPPED: dict[str, tuple[Callable[[OlmoeForCausalLM], nn.Module], str]] = {
    "compiled": (compiled, r"_orig_mod\. \(of torch\.compile\), such as _orig_mod\.lm_head\.weight"),
    "data parallel": (nn.DataParallel, r"module\. \(of DistributedDataParallel or DeepSpeed\)"),
    "both": (lambda model: nn.DataParallel(compiled(model)), r"_orig_mod\. .* and module\. "),
    "layers compiled": (compiled_layers, r"_orig_mod\. .* such as model\.layers\.0\._orig_mod\."),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_prefix_of_a_wrapper_is_named_and_taken_off(hf: Path, name: str) -> None:
    wrap, message = WRAPPED[name]
    model = OlmoeForCausalLM.from_pretrained(hf)
    expected = OlmoeForCausalLM.from_pretrained(hf)
    save_file(wrap(model).state_dict(), hf / "model.safetensors")
    assert_each_refuses(hf, rf"carry the prefix {message}.*strip_prefix=auto takes it off")
    assert_same(OlmoeForCausalLM.from_pretrained(hf, strip_prefix=True), expected)
    for run in verbs(hf, strip_prefix=StripPrefix.auto).values():
        run()
    assert_same(OlmoeForCausalLM.from_pretrained(hf.parent / "exported"), expected)


def test_prefixes_in_a_pickle(hf: Path) -> None:
    expected = OlmoeForCausalLM.from_pretrained(hf)
    torch.save(nn.DataParallel(expected).state_dict(), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"carry the prefix module\."):
        OlmoeForCausalLM.from_pretrained(hf, trust_pickle=True)
    assert_same(OlmoeForCausalLM.from_pretrained(hf, trust_pickle=True, strip_prefix=True), expected)


def test_names_that_are_equal_without_their_prefixes_are_refused(hf: Path) -> None:
    edit_tensors(hf, lambda tensors: tensors.update({f"module.{NORM}": tensors[NORM] + 1}))
    with pytest.raises(UserError, match=rf"{NORM} and module\.{NORM} are both {NORM}"):
        OlmoeForCausalLM.from_pretrained(hf, strip_prefix=True)


@pytest.fixture
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_training_starts_from_wrapped_weights(tmp_path: Path, process_group: None) -> None:
    data = write_data(tmp_path / "data")

    def losses(run: str, steps: int, **model: Any) -> list[float]:
        one_rank = {"parallel": ParallelConfig(), "trainer": {"max_steps": steps}}
        train(config(data, tmp_path / run, model=model, **one_rank))
        return [record["train/loss"] for record in metrics(tmp_path / run)]

    torch.manual_seed(0)
    stored = OlmoeForCausalLM(olmoe_config(config(data, tmp_path).model))
    stored.save_pretrained(tmp_path / "plain")
    stored.config.save_pretrained(tmp_path / "wrapped")
    save_file(compiled(stored).state_dict(), tmp_path / "wrapped" / "model.safetensors")
    with pytest.raises(UserError, match=r"carry the prefix _orig_mod\..*model\.strip_prefix=auto"):
        losses("refused", 1, init_from=str(tmp_path / "wrapped"))
    wrapped = losses("run", 1, init_from=str(tmp_path / "wrapped"), strip_prefix=StripPrefix.auto)
    assert wrapped == losses("other", 1, init_from=str(tmp_path / "plain"))
    # The keys of the first weights may be left out where the run goes on.
    assert len(losses("run", 2)) == 2


# --- values that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_weight_that_is_not_finite_is_named(hf: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[NORM][[3, 5]] = value

    edit_tensors(hf, spoil)
    assert_each_refuses(hf, rf"hf/model\.safetensors: {NORM}\[3\] is {value}; ")
    with pytest.raises(UserError, match=rf"{NORM}\[3\] is {value}"):
        OlmoeForCausalLM.from_pretrained(hf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_first_value_that_is_not_finite(dtype: torch.dtype) -> None:
    tensor = torch.full((3, 4, 5), torch.finfo(dtype).max, dtype=dtype)
    tensor[0] = torch.finfo(dtype).min
    assert first_not_finite(tensor) is None, "the largest values are finite, if not their difference"
    assert first_not_finite(tensor[:0]) is None
    tensor[2, 3, 4] = -math.inf
    assert first_not_finite(tensor) == "[2, 3, 4] is -inf"
    tensor[1, 0, 2] = math.nan
    assert first_not_finite(tensor) == "[1, 0, 2] is nan"
    assert first_not_finite(tensor.transpose(0, 2)) == "[2, 0, 1] is nan"


def test_logits_that_are_not_finite_are_named(hf: Path) -> None:
    """Finite weights: 320 x 300 = 96,000 is more than the largest half, 65,504; and the largest float
    overflows."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"].fill_(0)
        tensors["model.norm.weight"][0] = 1e38
        tensors["lm_head.weight"].fill_(0)
        tensors["lm_head.weight"][7, 0] = 1e38

    edit_tensors(hf, spoil)
    runs = verbs(hf)
    length = len(load_tokenizer(hf).encode("def").ids)
    with pytest.raises(UserError, match=rf"after {length} tokens, logits\[0, 7\] is -?inf \(row, token\)"):
        runs["generate"]()
    with pytest.raises(UserError, match=r"logits\[0, 0, 7\] is -?inf \(sequence, position, token\)"):
        runs["evaluate"]()


# --- what config.json says of the weights -------------------------------------------------------------------


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_weights_are_refused_with_the_reason(hf: Path, key: str) -> None:
    """The tensors are plain, as before: Transformers would quantize them while it loads."""
    edit_json(hf / "config.json", lambda content: content.update({key: {"quant_method": "gptq", "bits": 4}}))
    assert_each_refuses(hf, rf"hf/config\.json has {key} \(quant_method gptq\), and quantized weights cannot")
    edit_json(hf / "config.json", lambda content: content.update({key: None}))
    OlmoeForCausalLM.from_pretrained(hf)


def test_a_dtype_that_is_not_the_files_is_told_with_what_is_done(
    hf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = verbs(hf)
    runs["generate"]()
    assert caplog.messages == []
    edit_json(hf / "config.json", lambda content: content.update({"dtype": "bfloat16"}))
    told = "says bfloat16, and the weights are stored in float32. They are converted to bfloat16 unless"
    for run in runs.values():
        caplog.clear()
        run()
        assert [told in message for message in caplog.messages[:1]] == [True], caplog.messages
    assert {tensor.dtype for tensor in tensors_of(hf.parent / "exported").values()} == {torch.bfloat16}
    export(ExportConfig(str(hf), out=str(hf.parent / "wide"), precision=Precision.fp32))
    assert_same(
        OlmoeForCausalLM.from_pretrained(hf.parent / "wide"),
        OlmoeForCausalLM.from_pretrained(hf, dtype=torch.float32),
    )


def test_several_dtypes_in_the_files_are_told(hf: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(hf / "config.json", lambda content: [content.pop(key) for key in ("dtype", "torch_dtype")])
    edit_tensors(hf, lambda tensors: tensors.update({NORM: tensors[NORM].half()}))
    model = OlmoeForCausalLM.from_pretrained(hf)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "names no dtype, and the weights are stored in float32 and float16" in caplog.messages[0]
    caplog.clear()
    # A constant that older converters wrote is no weight.
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2).half()}
    edit_tensors(hf, lambda tensors: tensors.update({NORM: tensors[NORM].float()} | constant))
    OlmoeForCausalLM.from_pretrained(hf)
    assert caplog.messages == []

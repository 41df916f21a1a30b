"""The adapter of model.adapter_from: what it decides, and what contradicts it."""

from pathlib import Path

import pytest
import torch

from olmoe_train.config import compose
from olmoe_train.config.adapter import LoraConfig
from olmoe_train.config.choices import AdapterScaling, AdapterTarget
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter
from olmoe_train.model.adapters.peft_write import write_peft
from olmoe_train.model.adapters.spec import EXPERTS, LM_HEAD, AdapterSpec, is_adapter_parameter
from olmoe_train.utils.errors import UserError
from tests.support.sizes import SIZES

# 8 / 49 * 49 is not 8 in floating point.
SPEC = AdapterSpec(rank=49, alpha=8.0, targets=(EXPERTS, LM_HEAD))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Keys that name a model, and an adapter of it."""
    directory = tmp_path_factory.mktemp("initial_adapter")
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
    model.save_pretrained(directory / "base")
    add_adapter(model, SPEC)
    tensors = {name: torch.ones_like(p) for name, p in model.named_parameters() if is_adapter_parameter(name)}
    write_peft(directory / "adapter", SPEC, tensors, tensors.__getitem__, "base")
    return [
        f"model.init_from={directory / 'base'}",
        "data.dir=x",
        f"model.adapter_from={directory / 'adapter'}",
    ]


def test_the_adapter_decides_what_is_not_given(keys: list[str]) -> None:
    agreeing = ["adapter.rank=49", "adapter.alpha=8", "adapter.targets=[lm_head,experts]"]
    for given in ([], agreeing):
        adapter = compose("adapter=lora", *keys, *given).adapter
        assert isinstance(adapter, LoraConfig)
        assert (adapter.rank, adapter.alpha, adapter.scaling) == (49, 8.0, AdapterScaling.standard)
        assert set(adapter.targets) == {AdapterTarget.experts, AdapterTarget.lm_head}


def test_each_key_that_contradicts_is_named_with_both_values(keys: list[str]) -> None:
    given = ["adapter.rank=8", "adapter.alpha=16", "adapter.targets=[attention]", "adapter.scaling=rslora"]
    with pytest.raises(UserError) as caught:
        compose("adapter=dora", *keys, *given)
    for expected in (
        "model.adapter_from=",
        "adapter=dora, and lora there",
        "adapter.rank=8, and 49 there",
        "adapter.alpha=16.0, and 8.0 there",
        "adapter.targets=[attention], and [experts, lm_head] there",
        "adapter.scaling=rslora, and standard there",
        "remove these keys",
    ):
        assert expected in str(caught.value)


def test_a_message_names_the_key(keys: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.adapter_from=.*: no adapter_config.json; give the directory"):
        compose("adapter=lora", *keys[:2], f"model.adapter_from={tmp_path}")
    with pytest.raises(UserError, match=r"model.adapter_from=.*: nothing trains it; set adapter=lora"):
        compose(*keys)

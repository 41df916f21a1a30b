"""Exports in other people's hands: Transformers' pipeline and accelerate's placement."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from olmoe_train.cli.export import main as export
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.model import OlmoeForCausalLM
from tests.parity.test_special_tokens import write_tokenizer
from tests.support.pair import TINY, make_pair

PROMPT = "w5 w17 w33"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the verb, in shards; what `olmoe export` leaves is all there is."""
    directory = tmp_path_factory.mktemp("reload")
    ours, _ = make_pair(TINY, seed=1)
    ours.save_pretrained(directory / "model")
    write_tokenizer(directory / "model", eos=2, pad=1)
    export(ExportConfig(str(directory / "model"), out=str(directory / "out"), max_shard_size="30KB"))
    assert len(list((directory / "out").glob("*.safetensors"))) > 1
    return directory / "out"


def continuation(directory: Path) -> list[int]:
    """Token ids of PROMPT and this package's greedy continuation."""
    ids = torch.tensor([load_tokenizer(directory).encode(PROMPT).ids])
    return OlmoeForCausalLM.from_pretrained(directory).generate(ids, max_new_tokens=8)[0].tolist()


def test_text_generation_pipeline(exported: Path) -> None:
    pipeline: Any = transformers.pipeline("text-generation", model=str(exported), device="cpu")
    output = pipeline(PROMPT, max_new_tokens=8, do_sample=False, return_tensors=True)
    assert output[0]["generated_token_ids"] == continuation(exported)
    assert len(continuation(exported)) == 3 + 8
    assert pipeline(PROMPT, max_new_tokens=8, do_sample=False)[0]["generated_text"].startswith(PROMPT)


def test_accelerate_places_it(exported: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, device_map="auto")
    assert isinstance(model, transformers.OlmoeForCausalLM)
    ids = torch.tensor([load_tokenizer(exported).encode(PROMPT).ids])
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokens[0].tolist() == continuation(exported)


def test_accelerate_offloads_it_to_the_disk(exported: Path, tmp_path: Path) -> None:
    """More model than memory: layer 1's weights stay in files and are fetched for each forward pass."""
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        exported, device_map=parts, offload_folder=str(tmp_path)
    )
    assert model.model.layers[1].mlp.experts.down_proj.is_meta
    whole = OlmoeForCausalLM.from_pretrained(exported)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)

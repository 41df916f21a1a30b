"""`olmoe upcycle`: which weights come from where, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from olmoe_train.checkpoint.convert import upcycle as upcycle_module
from olmoe_train.checkpoint.convert.upcycle import model_overrides
from olmoe_train.cli.upcycle import main as upcycle
from olmoe_train.config.reference import documented_keys, help_text
from olmoe_train.config.verbs import UpcycleConfig
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.initialization import initial_value
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared
from tests.support.hf_directories import TINY

# Hidden 8, an MLP of width 6; weights large enough that an error in one shows in the logits.
DENSE: dict[str, Any] = TINY | {"num_experts": 1, "num_experts_per_tok": 1, "initializer_range": 0.5}
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(**DENSE)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def weights(source: Path, out: str, experts: int, top_k: int, **options: Any) -> dict[str, torch.Tensor]:
    upcycle(UpcycleConfig(str(source), str(source.parent / out), experts, top_k, **options))
    return OlmoeForCausalLM.from_pretrained(source.parent / out).state_dict()


def test_experts_are_slices_of_copies_and_share_a_router_row(dense: Path) -> None:
    before = OlmoeForCausalLM.from_pretrained(dense).state_dict()
    after = weights(dense, "moe", 6, 3, intermediate_size=2, seed=4)
    gate, up, down = before[GATE_UP][0, :6], before[GATE_UP][0, 6:], before[DOWN][0]
    rows = initial_value(ROUTER, (2, 8), seed=4, std=0.5)
    for expert in range(6):
        part = slice(2 * (expert % 3), 2 * (expert % 3) + 2)
        assert torch.equal(after[GATE_UP][expert], torch.cat([gate[part], up[part]]))
        assert torch.equal(after[DOWN][expert], 3 * down[:, part])
        assert torch.equal(after[ROUTER][expert], rows[expert // 3])
    assert not torch.equal(rows[0], rows[1])
    for name, tensor in after.items():
        assert ".mlp." in name or torch.equal(tensor, before[name]), name


def test_seed_and_noise(dense: Path) -> None:
    before = OlmoeForCausalLM.from_pretrained(dense).state_dict()
    options = {"noise_fraction": 0.5, "noise_std": 3.0}
    first, again = weights(dense, "a", 4, 2, **options), weights(dense, "b", 4, 2, **options)
    other = weights(dense, "c", 4, 2, seed=1, **options)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, other[name]) == (".mlp." not in name), name
    for name in (GATE_UP, DOWN):
        kept = first[name] == before[name]
        assert kept.float().mean() == pytest.approx(0.5, abs=0.1)
        assert first[name][~kept].std() == pytest.approx(3.0, rel=0.2)  # cut at 3 deviations: 2.96
        patterns = {tuple(copy.flatten().tolist()) for copy in kept}
        assert len(patterns) == 4, "every copy has a noise of its own"
    whole = weights(dense, "d", 2, 1, noise_fraction=1.0, norm_topk_prob=False)
    assert not (whole[GATE_UP] == before[GATE_UP]).any()


@pytest.mark.parametrize(
    ("experts", "top_k", "options", "message"),
    [
        (4, 5, {}, "num_experts_per_tok=5 is more than num_experts=4"),
        (0, 1, {}, "num_experts=0 must be an integer of at least 1"),
        (4, 2, {"intermediate_size": 4}, "intermediate_size=4: must divide the width of the dense MLP, 6"),
        (4, 2, {"intermediate_size": 0}, "intermediate_size=0: must divide"),
        (8, 3, {"intermediate_size": 2}, "num_experts=8: must be a multiple of 3, the number of experts of"),
        (9, 4, {"intermediate_size": 2}, "num_experts_per_tok=4: must be a multiple of 3"),
        (4, 2, {"noise_fraction": 1.5}, "noise_fraction=1.5: must be from 0 to 1"),
        (4, 2, {"noise_fraction": 0.5, "noise_std": 0.0}, "noise_std=0.0: must be positive"),
        (4, 2, {"data_dir": "nowhere"}, "nowhere"),
        (4, 2, {"tokenizer": "nowhere"}, "tokenizer=nowhere: does not exist"),
        (4, 2, {"step": "3"}, "step=3: source=.* has no steps"),
        (4, 2, {"max_shard_size": "big"}, "max_shard_size=big: write a size"),
    ],
    ids=str,
)
def test_wrong_values(dense: Path, experts: int, top_k: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        weights(dense, "moe", experts, top_k, **options)
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]


def test_wrong_sources(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source=.*nothing: neither an HF directory"):
        weights(tmp_path / "nothing", "moe", 4, 2)
    OlmoeForCausalLM(OlmoeConfig(**TINY)).save_pretrained(tmp_path / "sparse")
    with pytest.raises(UserError, match="not a dense model: it has 3 experts per layer"):
        weights(tmp_path / "sparse", "moe", 4, 2)
    (dense / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights found"):
        weights(dense, "moe", 4, 2)


def test_what_is_there_is_left_alone(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(dense, "moe", 4, 2)
    before = {path.name: path.read_bytes() for path in (dense.parent / "moe").iterdir()}
    weights(dense, "moe", 4, 2)
    assert "already upcycled, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not empty"):
        weights(dense, "moe", 4, 2, seed=1)
    with pytest.raises(UserError, match="is not empty"):
        weights(dense, "moe", 8, 2)
    assert {path.name: path.read_bytes() for path in (dense.parent / "moe").iterdir()} == before


def test_a_wrong_result_does_not_appear(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of outputs is one: here down_proj is not what it should be."""
    right = upcycle_module.upcycled_reader

    def wrong(*args: Any) -> Any:
        read = right(*args)
        return lambda name: 1.01 * read(name) if name == DOWN else read(name)

    monkeypatch.setattr(upcycle_module, "upcycled_reader", wrong)
    with pytest.raises(RuntimeError, match="should equal the dense model's"):
        weights(dense, "moe", 4, 2)
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]


def test_warnings(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(dense, "a", 4, 2)
    assert "warning:" not in capsys.readouterr().out
    weights(dense, "b", 4, 1, noise_std=0.1)
    printed = capsys.readouterr().out
    assert "warning: noise_std=0.1 has no effect: noise_fraction is 0" in printed
    assert "warning: num_experts_per_tok=1 with norm_topk_prob=true" in printed


def test_prepared_tokens_are_compared_on(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prepared(tmp_path / "short", [[5] * 100], [[6] * 9], vocab_size=40)
    with pytest.raises(UserError, match="short: has 101 tokens, 512 are needed"):
        weights(dense, "moe", 4, 2, data_dir=str(tmp_path / "short"))
    write_prepared(tmp_path / "other", [[5] * 600], [[6] * 9], vocab_size=41)
    with pytest.raises(UserError, match="token ids up to 40, and the model's vocab_size is 40"):
        weights(dense, "moe", 4, 2, data_dir=str(tmp_path / "other"))
    write_prepared(tmp_path / "enough", [[5] * 600], [[6] * 9], vocab_size=40)
    weights(dense, "moe", 4, 2, data_dir=str(tmp_path / "enough"))
    assert "(tokens of enough)" in capsys.readouterr().out


def test_overrides_describe_the_model() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    config = OlmoeConfig(rope_parameters=rope, norm_topk_prob=True, pad_token_id=None)
    overrides = model_overrides(config)
    assert "model.rope_parameters='{rope_type:linear,factor:2.0,rope_theta:5.0}'" in overrides
    assert {"model.hidden_size=2048", "model.norm_topk_prob=true", "model.pad_token_id=null"} <= set(
        overrides
    )
    assert not any(text.startswith(("model.hidden_act", "model.init_from")) for text in overrides)


def test_every_option_is_documented() -> None:
    rows = documented_keys(UpcycleConfig)
    assert [key for key, _, doc in rows if not doc] == []
    text = help_text("upcycle", UpcycleConfig)
    assert "usage: olmoe upcycle" in text
    assert "tokenizer=bpe" not in text, "a key of that name is no group of presets"

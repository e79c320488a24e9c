"""Weights set to zero one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.compress.prune import Sparsify, sparsify
from deepseek.compress.prune.sparsify import keeps_share, keeps_two_of_four
from deepseek.errors import ConfigError
from tests.compress.prune import BERT, LLAMA, calibration, made, work_of
from tests.models.zoo import ours, reference


@given(rows=st.integers(1, 5), fours=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_two_best_of_every_four_are_kept(rows: int, fours: int, seed: int) -> None:
    scores = torch.rand(rows, 4 * fours, generator=torch.Generator().manual_seed(seed))
    keeps = keeps_two_of_four(scores)
    for row, kept in zip(scores.tolist(), keeps.tolist(), strict=True):
        for start in range(0, len(row), 4):
            best = sorted(range(start, start + 4), key=lambda place: -row[place])[:2]
            assert [place for place in range(start, start + 4) if kept[place]] == sorted(best)


@given(width=st.integers(1, 30), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_the_least_of_every_row_go(width: int, share: float, seed: int) -> None:
    scores = torch.rand(3, width, generator=torch.Generator().manual_seed(seed))
    keeps = keeps_share(scores, share)
    assert keeps.sum(1).tolist() == [width - int(width * share)] * 3
    for row, kept in zip(scores, keeps, strict=True):
        if (~kept).any():
            assert row[~kept].max() <= row[kept].min()


@pytest.mark.parametrize("importance", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("config", [LLAMA, BERT])
def test_half_of_every_row_is_zero(
    tmp_path: Path, config: Any, pattern: Any, importance: Any
) -> None:
    work = work_of(made(config), tmp_path)
    dense = {name: value.clone() for name, value in work.model.state_dict().items()}
    stage = Sparsify(pattern=pattern, importance=importance, calibration=calibration(tmp_path))
    outcome = {item.name: item for item in sparsify.apply(stage, work)}
    assert outcome["sparsity"].value == pytest.approx(0.5)
    assert "no kernel here skips them" in outcome["sparsity"].conditions["speed"]
    for name, value in work.model.state_dict().items():
        changed = ".weight" in name and value.dim() == 2 and "layer" in name
        changed &= "embed" not in name and "pooler" not in name
        if changed:
            assert ((value == 0).sum(1) == value.shape[1] // 2).all()
            assert torch.equal(value[value != 0], dense[name][value != 0])
        else:
            assert torch.equal(value, dense[name])


def test_wanda_weighs_by_the_input(tmp_path: Path) -> None:
    """A channel that carries nothing goes first, however large its weights are."""
    model = made(LLAMA)
    layer = model.model.layers[0]  # type: ignore[union-attr]
    with torch.no_grad():
        layer.input_layernorm.weight[3] = 1e-4
        layer.self_attn.q_proj.weight[:, 3] = 1.0
    stage = Sparsify(share=0.1, calibration=calibration(tmp_path))
    sparsify.apply(stage, work_of(model, tmp_path))
    assert (layer.self_attn.q_proj.weight[:, 3] == 0).all()


def test_experts_go_by_magnitude_alone(tmp_path: Path) -> None:
    model = ours(reference("qwen3-moe", vocab_size=320))
    work = work_of(model, tmp_path)
    with pytest.raises(ConfigError, match="magnitude where there are experts"):
        sparsify.apply(Sparsify(calibration=calibration(tmp_path)), work)
    router = model.model.layers[0].mlp.gate.weight.clone()
    sparsify.apply(Sparsify(importance="magnitude"), work)
    experts = model.model.layers[0].mlp.experts
    assert float((experts.down_proj == 0).float().mean()) == pytest.approx(0.5)
    assert torch.equal(model.model.layers[0].mlp.gate.weight, router)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="share"):
        Sparsify(share=1.0)
    with pytest.raises(ConfigError, match=r"0\.5 with 2:4"):
        Sparsify(pattern="2:4", share=0.4)
    with pytest.raises(ConfigError, match="no multiple of four"):
        keeps_two_of_four(torch.ones(2, 6))

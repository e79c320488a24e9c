"""A fine-tuned model on the grid of the bundle before it: what moved is re-rounded, and no more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek import hub
from deepseek.cli.main import main
from deepseek.errors import ConfigError
from deepseek.export.delta import apply_delta, make_delta, make_keys, on_grid_of
from deepseek.export.delta.requantizing import fresh_grid, moved
from deepseek.hub import Bundle, Quantized
from deepseek.models import Encoder, EncoderConfig
from deepseek.ops.grid import Floats, Grid
from tests.export.delta_bundles import INT4, INT8
from tests.grids import put_on_grids, rounded
from tests.hub.tiny import tiny_decoder, tiny_tokenizer

GRIDS = {
    "int8": {"bits": 8, "group": 64, "symmetric": True},
    "int4": {"bits": 4, "group": 32, "symmetric": False},
    "rotated": {"bits": 8, "group": 64, "symmetric": True, "rotated": True},
}


def weight_and_grid(kind: str, seed: int) -> tuple[Floats, Grid]:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    return weight.numpy(), rounded(weight, **GRIDS[kind]).grid()


def noisy(weight: Floats, size: float, seed: int) -> Floats:
    noise = np.random.default_rng(seed).standard_normal(weight.shape)
    return (weight + size * noise).astype(np.float32)


@given(st.sampled_from([*GRIDS]), st.integers(0, 1000), st.floats(0, 0.3))
def test_without_a_margin_every_code_is_the_nearest(kind: str, seed: int, size: float) -> None:
    weight, grid = weight_and_grid(kind, seed)
    new = noisy(weight, size, seed)
    found = moved(grid, new)
    # no step of any code brings its number nearer, but at the ends
    error = np.abs(_numbers(found.grid) - _rotated(found.grid, new))
    for step in (-1, 1):
        codes = (found.grid.codes.astype(int) + step).clip(0, (1 << grid.bits) - 1)
        other = dataclasses.replace(found.grid, codes=codes.astype(np.uint8))
        nearer = np.abs(_numbers(other) - _rotated(other, new)) < error * (1 - 1e-4) - 1e-5
        assert not (nearer & (codes > 0)).any()
    assert found.num_changed == (found.grid.codes != grid.codes).sum()


@given(st.sampled_from([*GRIDS]), st.integers(0, 1000), st.floats(0, 0.5), st.floats(0, 0.2))
def test_a_larger_margin_changes_fewer_codes(
    kind: str, seed: int, margin: float, size: float
) -> None:
    weight, grid = weight_and_grid(kind, seed)
    new = noisy(weight, size, seed)
    plain, sticky = moved(grid, new), moved(grid, new, margin=margin)
    changed = sticky.grid.codes != grid.codes
    assert (sticky.grid.codes[changed] == plain.grid.codes[changed]).all()
    assert sticky.num_changed <= plain.num_changed


@pytest.mark.parametrize("kind", GRIDS)
def test_what_did_not_move_keeps_its_code(kind: str) -> None:
    weight, grid = weight_and_grid(kind, 0)
    # a rounding that was learned: some codes are not the nearest
    codes = grid.codes.astype(int) + np.random.default_rng(0).integers(-1, 2, grid.codes.shape)
    learned = dataclasses.replace(grid, codes=codes.clip(1, (1 << grid.bits) - 1).astype(np.uint8))
    kept = moved(learned, weight, weight)
    assert kept.num_changed == 0 and np.array_equal(kept.grid.codes, learned.codes)
    assert moved(learned, weight).num_changed > 0
    new = weight.copy()
    new[0] += 0.5
    found = moved(learned, new, weight)
    assert found.num_changed > 0 and np.array_equal(found.grid.codes[1:], learned.codes[1:])


def test_what_lies_beyond_the_grid_is_counted() -> None:
    weight, grid = weight_and_grid("int8", 0)
    found = moved(grid, 3 * weight)
    assert found.num_clipped == (np.abs(np.rint(3 * weight / grid.scale)) > 127).sum() > 0
    assert found.grid.codes.min() >= 1
    assert found.distance == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_fresh_grid_is_near(kind: str) -> None:
    weight, grid = weight_and_grid(kind, 0)
    found = fresh_grid(grid, 2 * weight)
    step = np.repeat(found.scale, found.group, 1)
    assert (np.abs(_numbers(found) - _rotated(found, 2 * weight)) < 0.6 * step + 1e-6).all()


def _rotated(grid: Grid, weight: Floats) -> Floats:
    from deepseek.ops.rotation import rotate

    return rotate(weight) if grid.is_rotated else weight


def _numbers(grid: Grid) -> Floats:
    return dataclasses.replace(grid, is_rotated=False).values()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model in floats, a fine-tune of it, and the model on a grid."""
    for name in ("before", "tuned", "old"):
        model = tiny_decoder(vocab_size=330)
        model.tokenizer = tiny_tokenizer()
        if name == "tuned":
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.data.add_(0.003 * torch.randn_like(parameter))
        kinds = INT4 if name == "old" else None
        weights = put_on_grids(model, kinds) if kinds else {}
        quantized = Quantized(weights=weights, kv="int8") if kinds else None
        hub.save(model, tmp_path / name, quantized=quantized)
    return tmp_path


def test_a_fine_tune_goes_on_the_old_grid(models: Path) -> None:
    old = Bundle.open(models / "old")
    done = on_grid_of(old, models / "tuned", models / "new", price_tokens=40)
    assert done.bundle.kv == "int8" and [*done.bundle.grids] == [*old.grids]
    for name, grid in done.bundle.grids.items():
        for one, other in zip(grid.read_scales(), old.grids[name].read_scales(), strict=True):
            assert np.array_equal(one, other), name
    figures = {item.name: item.value for item in done.measurements[:2]}
    assert 0 < figures["changed_codes"] < 0.2 and figures["clipped_weights"] < 0.01
    prices = done.measurements[2:]
    assert [item.conditions["grid"] for item in prices] == ["of the old bundle", "its own"]
    assert all(item.value > 0 for item in prices)
    parents = [parent.content_hash for parent in done.bundle.card.parents]
    assert parents == [Bundle.open(models / "tuned").content_hash, old.content_hash]
    assert Bundle.open(models / "new", verify=True).card.measurements == done.measurements


def test_margin_and_before_make_it_smaller(models: Path) -> None:
    old, tuned = models / "old", models / "tuned"
    sizes = []
    for number, settings in enumerate([{}, {"margin": 0.3}, {"before": models / "before"}]):
        found = on_grid_of(old, tuned, models / f"new{number}", price_tokens=0, **settings)
        sizes.append(found.measurements[0].value)
    assert sizes[1] < sizes[0] and sizes[2] <= sizes[0]


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"margin": 0.6}, "margin"),
        ({"margin": float("nan")}, "margin"),
        ({"most_clipped": -1.0}, "beyond the ends"),
    ],
)
def test_settings_that_cannot_be(models: Path, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        on_grid_of(models / "old", models / "tuned", models / "new", **settings)
    assert not (models / "new").exists()


def test_other_models_are_refused(models: Path) -> None:
    hub.save(tiny_decoder(seed=3, vocab_size=330), models / "stranger")
    hub.save(tiny_decoder(vocab_size=400), models / "wider")
    hub.save(tiny_decoder(vocab_size=330, num_hidden_layers=1), models / "short")
    for tuned, said in [
        ("stranger", "of its length"),
        ("wider", "shape"),
        ("short", "no such weight"),
    ]:
        with pytest.raises(ConfigError, match=said):
            on_grid_of(models / "old", models / tuned, models / "new")
    with pytest.raises(ConfigError, match="in floats"):
        on_grid_of(models / "old", models / "old", models / "new")
    with pytest.raises(ConfigError, match="on a grid of integers"):
        on_grid_of(models / "before", models / "tuned", models / "new")


def test_the_command_line_puts_floats_on_the_grid(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, trust = make_keys(models / "key")
    words = ["make", models / "old", models / "tuned", "--out", models / "package", "--key", key]
    more = ["--keep", models / "kept", "--before", models / "before", "--no-price", "--json"]
    assert main(["delta", *map(str, [*words, *more])]) == 0
    names = [item["name"] for item in json.loads(capsys.readouterr().out)["measurements"]]
    assert names[:3] == ["changed_codes", "clipped_weights", "package_bytes"]
    kept = Bundle.open(models / "kept", verify=True)
    done = apply_delta(models / "package", models / "old", trust)
    assert done.bundle.content_hash == kept.content_hash
    assert {path.name for path in models.iterdir() if path.name.startswith("tmp")} == set()


def tiny_encoder() -> Encoder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
    return Encoder(EncoderConfig(vocab_size=80, max_positions=48, **sizes)).eval()


def test_encoders_too(tmp_path: Path) -> None:
    model = tiny_encoder()
    hub.save(model, tmp_path / "before")
    hub.save(model, tmp_path / "old", quantized=Quantized(weights=put_on_grids(model, INT8)))
    tuned = tiny_encoder()
    for parameter in tuned.parameters():
        parameter.data.mul_(1.002)
    hub.save(tuned, tmp_path / "tuned")
    done = on_grid_of(tmp_path / "old", tmp_path / "tuned", tmp_path / "new")
    assert [item.name for item in done.measurements] == ["changed_codes", "clipped_weights"]
    key, trust = make_keys(tmp_path / "key")
    make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "package", key)
    done = apply_delta(tmp_path / "package", tmp_path / "old", trust)
    assert done.bundle.content_hash == Bundle.open(tmp_path / "new").content_hash


@pytest.mark.slow
def test_smollm2_whose_weights_moved_a_little(smollm2_folder: Path, tmp_path: Path) -> None:
    model = hub.load(smollm2_folder, dtype="float32")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(
            torch.randn_like(parameter), alpha=0.005 * parameter.detach().std().item()
        )
    hub.save(model, tmp_path / "tuned")
    model = hub.load(smollm2_folder, dtype="float32")
    hub.save(model, tmp_path / "old", quantized=Quantized(weights=put_on_grids(model, INT8)))
    done = on_grid_of(tmp_path / "old", tmp_path / "tuned", tmp_path / "new", price_tokens=128)
    prices = [item.value for item in done.measurements[2:]]
    assert prices[0] < 1.5 * prices[1]
    key, trust = make_keys(tmp_path / "key")
    made = make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "package", key)
    assert made.share < 0.2
    assert made.entropy_bytes < made.package_bytes - 100_000 < 1.03 * made.entropy_bytes
    apply_delta(tmp_path / "package", tmp_path / "old", trust)
    found, expected = (hub.load(tmp_path / name).state_dict() for name in ("old", "new"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())

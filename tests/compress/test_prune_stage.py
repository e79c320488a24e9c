"""The stage: scores, curves, search, seconds, and what it tells of its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepseek.compress import Calibration
from deepseek.compress.calibration import Batch
from deepseek.compress.prune import LatencyModel, Prune, Shape, Workload, structured
from deepseek.compress.prune.cut import anatomy
from deepseek.compress.prune.importance import input_squares, layer_scores, unit_scores
from deepseek.compress.prune.latency import _fit, fit_latency, neighbours, prompt_features
from deepseek.compress.prune.search import (
    Curve,
    measured_curve,
    search,
    seconds_cost,
    sizes_of,
)
from deepseek.compress.prune.shape import filled, resized, shape_of
from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.ops.cpu import why_missing
from tests.compress.prune import BATCHES, BERT, IDS, LLAMA, calibration, made, work_of, zero_read
from tests.models.zoo import ours, reference

needs_kernels = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
WORKLOAD = Workload(prompt_tokens=32, new_tokens=4, threads=1)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
@pytest.mark.parametrize("part", ["channels", "heads"])
def test_what_nothing_reads_has_no_score(importance: Any, part: str) -> None:
    model = made(LLAMA)
    found = anatomy(model)
    for group in found.of(part):
        for name, dim in group.read:
            zero_read(model, name, dim, group.kept_places((name, dim), torch.tensor([1])))
    scores = unit_scores(model, found, importance, BATCHES)
    for score, each in zip(scores, found.parts, strict=True):
        if each == part:
            assert int(score.argmin()) == 1 and float(score[1]) == 0
            assert (score[[0, 2]] > 0).all()


def test_taylor_is_the_slope_of_the_loss() -> None:
    model = made(LLAMA).double()
    assert isinstance(model, Decoder)
    found = anatomy(model)
    scores = unit_scores(model, found, "taylor", BATCHES)
    place = found.parts.index("channels")
    weight = model.model.layers[0].mlp.down_proj.weight
    losses = []
    for scale in (1 - 1e-5, 1 + 1e-5):
        with torch.no_grad():
            kept = weight[:, 7].clone()
            weight[:, 7] *= scale
            logits = model(IDS).logits[:, :-1].flatten(0, 1)
            losses.append(float(F.cross_entropy(logits, IDS[:, 1:].flatten())))
            weight[:, 7] = kept
    slope = abs(losses[1] - losses[0]) / 2e-5
    assert float(scores[place][7]) == pytest.approx(slope, rel=1e-3)
    assert all(each.grad is None and each.requires_grad for each in model.parameters())


def test_magnitude_is_the_norm_of_the_unit() -> None:
    model = made(LLAMA)
    found = anatomy(model)
    scores = unit_scores(model, found, "magnitude", [])
    layer = model.model.layers[0].self_attn  # type: ignore[union-attr]
    parts = [
        layer.q_proj.weight[16:32],
        layer.k_proj.weight[8:16],
        layer.v_proj.weight[8:16],
        layer.o_proj.weight[:, 16:32],
    ]
    expected = torch.cat([part.detach().flatten() for part in parts]).norm()
    assert float(scores[found.parts.index("heads")][1]) == pytest.approx(float(expected), rel=1e-5)


def test_inputs_are_squared_without_padding() -> None:
    model = made(BERT)
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    name = "encoder.layer.0.attention.self.query.weight"
    padded = input_squares(model, [Batch(IDS, mask)])[name]
    apart = input_squares(model, [Batch(IDS[:1], None), Batch(IDS[1:, :5], None)])[name]
    torch.testing.assert_close(padded, apart)


def test_a_layer_that_adds_nothing_has_no_score() -> None:
    model = made(LLAMA)
    layer = model.model.layers[1]  # type: ignore[union-attr]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    scores = layer_scores(model, BATCHES)
    assert float(scores[1]) == pytest.approx(0, abs=1e-6)
    assert (scores[[0, 2]] > 1e-3).all()


def test_sizes_are_multiples_and_at_least_a_half() -> None:
    assert sizes_of(LLAMA, "channels", 16) == [32, 48]
    assert sizes_of(LLAMA, "channels", 5) == [25, 30, 35, 40, 45, 48]
    assert sizes_of(LLAMA, "heads", 64) == [2, 3]
    assert sizes_of(BERT, "width", 8) == [24, 48]
    experts = ours(reference("qwen3-moe")).config
    assert sizes_of(experts, "experts", 64) == [4, 5, 6, 7, 8]


def test_a_curve_never_falls_where_more_is_cut() -> None:
    losses = {3: -0.2, 2: 0.5, 1: 0.4}
    curve = measured_curve(
        LLAMA.replace(num_layers=4),
        "layers",
        [1, 2, 3, 4],
        lambda shape: 1.0 + losses[shape.layers or 0],
        1.0,
    )
    assert curve.sizes[-1] == 4 and curve.at(4) == 0
    assert curve.at(3) == 0
    assert curve.at(2) == 0.5 and curve.at(1) == 0.5
    assert curve.at(3) <= curve.at(2)


def test_the_search_is_the_best_of_all() -> None:
    sizes = {"layers": [2, 3], "channels": [24, 32, 40, 48]}
    curves = {
        "layers": Curve((2, 3), (1.0, 0.0)),
        "channels": Curve((24, 48), (1.2, 0.0)),
    }

    def cost(shape: Shape) -> float:
        assert shape.layers is not None and shape.channels is not None
        return shape.layers * (10 + shape.channels)

    found = search(LLAMA, curves, sizes, cost, 0.25)
    every = [
        (curves["layers"].at(layers) + curves["channels"].at(channels), -cost_of, layers, channels)
        for layers in sizes["layers"]
        for channels in sizes["channels"]
        if (cost_of := layers * (10 + channels)) <= 0.75 * 3 * 58
    ]
    best = min(every)
    assert (found.shape.layers, found.shape.channels) == best[2:]
    assert found.cost == -best[1] and found.loss == pytest.approx(best[0])
    with pytest.raises(ConfigError, match="share of Prune must be at most"):
        search(LLAMA, curves, sizes, cost, 0.9)


def test_seconds_of_features_are_found_again() -> None:
    rows = [(float(a), float(b), float(c)) for a, b, c in np.random.default_rng(0).random((6, 3))]
    truth = (3.0, 0.0, 0.5)
    assert _fit(rows, [float(np.dot(row, truth)) for row in rows]) == pytest.approx(truth, abs=1e-9)
    negative = _fit(rows, [float(np.dot(row, (3.0, -0.1, 0.5))) for row in rows])
    assert min(negative) >= 0


def test_seconds_of_a_shape_are_those_of_its_config() -> None:
    latency = LatencyModel(WORKLOAD, (1e-9, 2e-9, 1e-6), (1e-9, 2e-9, 1e-6), 0.0)
    cost = seconds_cost(LLAMA, latency)
    shape = filled(LLAMA, Shape(layers=2, width=20, heads=1))
    assert cost(shape) == pytest.approx(latency.seconds(resized(LLAMA, shape, [0, 2])))


def test_more_tokens_cost_more() -> None:
    long = WORKLOAD.replace(prompt_tokens=64)
    for config in (LLAMA, BERT):
        short = prompt_features(config, WORKLOAD)
        more = prompt_features(config, long)
        assert more[0] > short[0] and more[1] > 3 * short[1]


@pytest.mark.parametrize("config", [LLAMA, BERT])
def test_neighbours_differ_in_every_size(config: Any) -> None:
    shapes = [shape_of(each) for each in neighbours(config)]
    assert shapes[0] == shape_of(config)
    for part in ("layers", "width", "channels"):
        assert any(shape.size(part) != shapes[0].size(part) for shape in shapes[1:])


@needs_kernels
def test_a_decoder_is_cut_by_a_share_of_its_seconds(tmp_path: Path) -> None:
    work = work_of(made(LLAMA), tmp_path)
    stage = Prune(
        share=0.2,
        target="latency",
        multiple=8,
        calibration=calibration(tmp_path),
        workload=WORKLOAD,
    )
    outcome = {item.name: item.value for item in structured.apply(stage, work)}
    assert outcome["predicted_s_after"] <= 0.8 * outcome["predicted_s_before"] * (1 + 1e-9)
    assert outcome["measured_s_after"] > 0 and outcome["measured_speedup"] > 0
    assert work.model.tokenizer is not None


@pytest.mark.parametrize("importance", ["activation", "magnitude", "taylor"])
def test_a_decoder_is_cut_by_a_share_of_its_parameters(tmp_path: Path, importance: Any) -> None:
    work = work_of(made(LLAMA), tmp_path)
    told: list[str] = []
    work.report = lambda words, share: told.append(words)
    stage = Prune(
        share=0.25,
        importance=importance,
        multiple=4,
        calibration=calibration(tmp_path),
        workload=WORKLOAD,
    )
    outcome = {item.name: item.value for item in structured.apply(stage, work)}
    count = sum(each.numel() for each in work.model.parameters())
    assert outcome["parameters_after"] == count
    assert 0.5 < outcome["parameters_kept"] <= 0.75
    assert 0 < outcome["importance_kept"] <= 1
    assert np.isfinite(outcome["probe_loss_after"])
    assert "tracing" in told


def test_an_encoder_is_cut(tmp_path: Path) -> None:
    work = work_of(made(BERT), tmp_path)
    stage = Prune(share=0.3, multiple=4, calibration=calibration(tmp_path), workload=WORKLOAD)
    outcome = {item.name: item.value for item in structured.apply(stage, work)}
    assert outcome["parameters_kept"] <= 0.7
    assert outcome["probe_loss_before"] == pytest.approx(0, abs=1e-6)
    assert 0 < outcome["probe_loss_after"] < 2
    assert outcome["measured_s_after"] > 0


def test_a_shape_is_come_to(tmp_path: Path) -> None:
    work = work_of(made(LLAMA), tmp_path)
    shape = Shape(layers=2, width=20)
    structured.apply(Prune(to=shape, calibration=calibration(tmp_path), workload=WORKLOAD), work)
    assert (work.model.config.num_layers, work.model.config.hidden_size) == (2, 20)


def test_a_stage_is_data() -> None:
    stage = Prune(to=Shape(width=8), calibration=Calibration(samples=3), parts=("layers",))
    assert Prune.from_dict(stage.to_dict()) == stage


@pytest.mark.parametrize("fields", [{"share": 0.0}, {"share": 1.0}, {"multiple": 0}, {"parts": ()}])
def test_settings_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Prune(**fields)


def test_what_cannot_be_scored_or_timed(tmp_path: Path) -> None:
    encoder = work_of(made(BERT), tmp_path)
    rest: dict[str, Any] = {"calibration": calibration(tmp_path), "workload": WORKLOAD}
    with pytest.raises(ConfigError, match="importance of Prune must be activation or magnitude"):
        structured.apply(Prune(importance="taylor", **rest), encoder)
    experts = ours(reference("deepseek-v3", vocab_size=320))
    with pytest.raises(ConfigError, match="magnitude or taylor where there are experts"):
        structured.apply(Prune(**rest), work_of(experts, tmp_path))
    with pytest.raises(ConfigError, match="latent attention"):
        fit_latency(experts.config, WORKLOAD)

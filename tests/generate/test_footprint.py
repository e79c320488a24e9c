"""What an engine takes of memory is known before it is made: never less than it then takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek import hub
from deepseek.face import load_engine
from deepseek.generate import Engine
from deepseek.generate.footprint import Footprint, engine_footprint
from deepseek.generate.modules import weights_of
from deepseek.models import Decoder
from deepseek.ops.cpu import why_missing
from deepseek.ops.scheme import Scheme
from tests.grids import put_on_grids
from tests.hub.tiny import tiny_decoder
from tests.models.zoo import ours, reference

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def footprint(model: Decoder, scheme: Scheme, **settings: Any) -> Footprint:
    asked = {"rows": 3, "context": 200, "threads": 2} | settings
    return engine_footprint(model.config, weights_of(model), scheme, **asked)


def check(engine: Engine, found: Footprint, pages: int) -> None:
    assert engine.weight_bytes <= found.weights_bytes <= engine.weight_bytes * 1.2 + (3 << 20)
    assert engine.native.plan_bytes <= found.states_bytes
    assert found.states_bytes <= 2 * engine.native.plan_bytes + (3 << 20)
    held = engine.new_pages(pages).num_bytes
    assert held - 4096 <= found.cache_bytes <= held


@pytest.mark.parametrize("scheme", ["float32", "bfloat16-kv8", "int8", "int8-row", "int4-g128-kv8"])
@pytest.mark.parametrize("case", ["llama", "qwen3-moe"])
def test_no_scheme_takes_more_than_was_said(tmp_path: Path, case: str, scheme: str) -> None:
    model = ours(reference(case))
    hub.save(model, tmp_path / "a")
    engine = load_engine(tmp_path / "a", scheme=scheme, threads=2)
    assert engine is not None
    check(engine, footprint(model, Scheme.named(scheme)), 3 * 4)


def test_weights_on_grids_are_counted_as_they_are_held(tmp_path: Path) -> None:
    model = tiny_decoder()
    weights = put_on_grids(model, {"down": (8, None, True), "": (4, 32, False)})
    hub.save(model, tmp_path / "a", quantized=hub.Quantized(weights=weights))
    loaded = hub.load(tmp_path / "a")
    assert isinstance(loaded, Decoder)
    engine = load_engine(tmp_path / "a", threads=2)
    assert engine is not None and engine.scheme.as_stored
    found = engine_footprint(
        loaded.config,
        weights_of(loaded, loaded.grids),
        engine.scheme,
        rows=1,
        context=64,
        threads=2,
    )
    check(engine, found, 1)


def test_the_peak_is_of_loading_or_of_running() -> None:
    parts = {"weights_bytes": 100, "states_bytes": 10, "cache_bytes": 5, "logits_bytes": 1}
    assert Footprint(**parts, loading_bytes=110).peak_bytes == 116
    assert Footprint(**parts, loading_bytes=150).peak_bytes == 150


def test_more_rows_and_a_longer_context_take_more() -> None:
    model = tiny_decoder()
    small = footprint(model, Scheme())
    for settings in ({"rows": 4}, {"context": 1000}, {"threads": 3}):
        assert footprint(model, Scheme(), **settings).running_bytes > small.running_bytes
    assert footprint(model, Scheme(kv="int8")).cache_bytes < small.cache_bytes

"""What a report says: whole, self-contained, and enough to ask a case again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.planted_bugs import usual_bugs
from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.export import Verified, verify
from deepseek.export.formats import Floats, Ids
from deepseek.export.manifest import MANIFEST, Manifest
from deepseek.export.verifying.allowed import tolerance_of
from deepseek.export.verifying.cases import Case
from deepseek.export.verifying.source import ModelReader
from deepseek.models import Decoder
from deepseek.records import Measurement
from tests.export.verifying.small import small_decoder, small_encoder


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Return a source."""
    return small_decoder()


def wrong(model: Decoder, name: str) -> ModelReader:
    """Return a wrong export."""
    return next(bug for bug in usual_bugs(model, 64) if bug.name == name).plant(model)


def report(folder: Path) -> dict[str, Any]:
    """Return the JSON report in a folder."""
    return json.loads((folder / "report.json").read_text(), parse_constant=_refuse)


def _refuse(word: str) -> None:
    raise AssertionError(word)


def test_a_report_is_whole_and_needs_nothing_beside_it(model: Decoder, tmp_path: Path) -> None:
    found = verify(model, wrong(model, "cache loses a token"), cases=60, report=tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", page)
    for drawing in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(drawing)
    assert page.count("<svg") >= 3
    written = report(tmp_path / "r")
    assert written["holds"] is False
    assert len(written["cases"]) == written["cases_asked"] == written["cases_wanted"] == 60
    assert {each["id"] for each in written["departed"]} == {each.case.id for each in found.departed}
    assert written["smallest"][0]["where"].endswith("reading on through the cache")
    for each in written["measurements"]:
        assert Measurement.from_dict(each).command.startswith("deepseek verify ")
    names = {each["name"] for each in written["measurements"]}
    assert names >= {"kl_divergence", "top1_agreement", "difference", "departed", "cases"}


def test_a_case_is_asked_again_by_its_id_and_by_its_file(model: Decoder, tmp_path: Path) -> None:
    reader = wrong(model, "mask ignored")
    found = verify(model, reader, cases=60, seed=5, report=tmp_path / "r")
    first = found.departed[0]
    again = verify(model, reader, cases=60, seed=5, only=first.case.id)
    assert [each.case for each in again.outcomes] == [first.case]
    assert again.outcomes[0].difference == pytest.approx(first.difference, rel=1e-3)
    files = sorted((tmp_path / "r" / "cases").iterdir())
    assert len(files) == len(found.departed) + len(found.smallest)
    for file in files:
        case = Case.from_dict(json.loads(file.read_text()))
        assert verify(model, reader, only=case).departed
        assert verify(model, ModelReader(model), only=case).holds


def test_the_same_seed_finds_the_same(model: Decoder) -> None:
    reader = wrong(model, "tail of 16 left out")
    first, second = (verify(model, reader, cases=100, seed=2) for _ in range(2))
    assert [each.case for each in first.departed] == [each.case for each in second.departed]
    assert first.smallest == second.smallest


def test_a_new_report_replaces_the_cases_of_the_old_one(model: Decoder, tmp_path: Path) -> None:
    verify(model, wrong(model, "mask ignored"), cases=60, report=tmp_path)
    assert list((tmp_path / "cases").iterdir())
    verify(model, ModelReader(model), cases=60, report=tmp_path)
    assert not list((tmp_path / "cases").iterdir())
    assert report(tmp_path)["holds"] is True


def test_an_interrupted_run_leaves_what_it_found(model: Decoder, tmp_path: Path) -> None:
    class Stopped(ModelReader):
        calls = 0

        def forward(self, ids: Ids, mask: Ids) -> Floats:
            self.calls += 1
            if self.calls > 20:
                raise KeyboardInterrupt
            return super().forward(ids, mask)

    with pytest.raises(KeyboardInterrupt):
        verify(model, Stopped(model), cases=60, report=tmp_path)
    written = report(tmp_path)
    assert written["is_partial"] is True and written["holds"] is False
    assert 20 <= written["cases_asked"] < 60
    assert "then it was stopped" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("kind", ["encoder", "classifier", "nothing"])
def test_reports_of_what_has_no_logits(kind: str, tmp_path: Path) -> None:
    class Silent(ModelReader):
        def forward(self, ids: Ids, mask: Ids) -> Floats:
            raise RuntimeError("no answer")

    labels = ("yes", "no") if kind == "classifier" else ()
    encoder = small_encoder(labels=labels)
    reader = Silent(encoder) if kind == "nothing" else ModelReader(encoder)
    found = verify(encoder, reader, cases=30, report=tmp_path)
    assert found.holds == (kind != "nothing")
    assert len(report(tmp_path)["measurements"]) >= 4


def test_progress_is_told_and_ends_with_all(model: Decoder) -> None:
    told: list[tuple[str, float | None]] = []
    verify(model, ModelReader(model), cases=20, progress=lambda *said: told.append(said))
    shares = [share for _, share in told if share is not None]
    assert shares == sorted(shares)
    assert told[-1] == ("case 20 of 20", 1.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "float32"),
        ({"quantize": "int8"}, "int8"),
        ({"quantize": None, "optimize": True}, "float32"),
        ({"floats": "BF16"}, "bfloat16"),
    ],
)
def test_a_manifest_says_what_is_allowed(
    options: dict[str, Any], named: str, model: Decoder, tmp_path: Path
) -> None:
    hub.save(model, tmp_path / "bundle")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "a.bin").write_bytes(b"a")
    bundle = hub.Bundle.open(tmp_path / "bundle")
    made = Manifest.of(tmp_path / "export", "onnx", "decoder", bundle, options, ())
    made.write(tmp_path / "export")
    assert tolerance_of(tmp_path / "export", model).name == named
    assert tolerance_of(tmp_path / "export" / "a.bin", model).name == named
    (tmp_path / "export" / MANIFEST).write_text("{")
    with pytest.raises(FormatError):
        tolerance_of(tmp_path / "export", model)


def test_mistakes_are_told(model: Decoder) -> None:
    reader = ModelReader(model)
    with pytest.raises(ConfigError, match="case of verify must be one of these 60"):
        verify(model, reader, cases=60, only="lengths-9999")
    with pytest.raises(ConfigError, match="ids below 330"):
        verify(model, reader, only=Case(id="a", kind="b", rows=((330,),)))
    with pytest.raises(ConfigError, match="at most 128 tokens"):
        verify(model, reader, only=Case(id="a", kind="b", rows=((1,) * 129,)))
    with pytest.raises(ConfigError, match=r"of its source.s kind"):
        verify(model, ModelReader(small_encoder()), cases=5)


def test_figures_are_those_of_the_positions(model: Decoder) -> None:
    class Noisy(ModelReader):
        def forward(self, ids: Ids, mask: Ids) -> Floats:
            found = super().forward(ids, mask)
            draw = np.random.default_rng(ids.shape[1])
            return found + draw.normal(size=found.shape, scale=0.05).astype(np.float32)

    found: Verified = verify(model, Noisy(model), cases=60, tolerance="int8")
    assert found.holds
    by_name = {(each.name, each.conditions.get("percentile")): each for each in found.measurements}
    mean = by_name["kl_divergence", None]
    assert mean.value == pytest.approx(found.positions.divergence.mean())
    assert mean.spread is not None and mean.spread.low < mean.value < mean.spread.high
    assert by_name["kl_divergence_percentile", 100].value == found.positions.divergence.max()
    assert by_name["top1_agreement", None].value == found.positions.agreement.mean() < 1
    assert by_name["cases", None].value == 60
    assert math.isfinite(by_name["chance_change", None].value)

"""A reader in a process of its own: what it answers, and what its end costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepseek import hub
from deepseek.errors import FormatError, VerifyError
from deepseek.export import verify
from deepseek.export.verifying.generator import generate
from deepseek.export.verifying.isolated import IsolatedReader, ReaderCrash
from deepseek.export.verifying.source import ModelReader, space_of
from tests.export.verifying.planted_format import install, write
from tests.export.verifying.small import small_decoder


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a bundle, with the planted format known to child processes."""
    monkeypatch.setenv("PYTHONPATH", install(tmp_path / "site"))
    hub.save(small_decoder(), tmp_path / "bundle")
    return tmp_path / "bundle"


def test_it_answers_as_the_reader_within(bundle: Path, tmp_path: Path) -> None:
    reader = IsolatedReader(write(tmp_path / "a", bundle))
    own = ModelReader(small_decoder())
    ids = np.array([[1, 2, 3, 4], [5, 6, 7, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert np.array_equal(reader.forward(ids, mask), own.forward(ids, mask))
    found = reader.layers(ids, mask)
    assert found is not None
    for one, other in zip(found, own.layers(ids, mask), strict=True):
        assert np.array_equal(one, other)
    first, state = reader.step(ids[:, :2], None)
    second, _ = reader.step(ids[:, 2:], state)
    again, _ = reader.step(ids[:, 2:], state)
    assert np.array_equal(second, again)
    whole = own.forward(ids, np.ones_like(ids))
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-5)
    reader.close()


@pytest.mark.parametrize("bug", ["dies", pytest.param("raises", marks=pytest.mark.slow)])
def test_a_crash_costs_a_case(bundle: Path, tmp_path: Path, bug: str) -> None:
    model = small_decoder()
    cases = generate(space_of(model, ModelReader(model), 2048), 30)
    widths = [case.width for case in cases if not case.steps]
    width = min(width for width in widths if widths.count(width) == 1 and width > 4)
    found = verify(bundle, write(tmp_path / "a", bundle, bug, width), cases=30)
    assert [outcome.case.width for outcome in found.departed] == [width]
    assert len(found.outcomes) == 30
    words = {"dies": "SIGSEGV", "raises": "INVALID_ARGUMENT"}
    assert words[bug] in found.smallest[0].departure.words
    assert found.smallest[0].smallest.width == width


@pytest.mark.slow
def test_a_reader_that_hangs_is_ended(bundle: Path, tmp_path: Path) -> None:
    reader = IsolatedReader(write(tmp_path / "a", bundle, "hangs"), timeout_s=20.0)
    reader._timeout_s = 0.5
    ids = np.ones((1, 17), np.int64)
    with pytest.raises(ReaderCrash, match=r"none in 0\.5 s"):
        reader.forward(ids, ids)
    reader._timeout_s = 20.0
    assert reader.forward(ids[:, :3], ids[:, :3]).shape == (1, 3, 330)
    reader.close()


@pytest.mark.slow
def test_crashes_without_end_end_the_run(bundle: Path, tmp_path: Path) -> None:
    export = write(tmp_path / "a", bundle, "always dies")
    with pytest.raises(VerifyError, match="kept alive; got '5 crashes"):
        verify(bundle, export, cases=30, report=tmp_path / "report")
    assert '"is_partial": true' in (tmp_path / "report" / "report.json").read_text()


def test_what_cannot_be_opened_is_told(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="SIGSEGV"):
        verify(bundle, write(tmp_path / "a", bundle, "dies while opening"), cases=30)
    (tmp_path / "a" / "model.planted").write_text('{"bundle')
    with pytest.raises(FormatError, match="must be whole"):
        verify(bundle, tmp_path / "a", cases=30)

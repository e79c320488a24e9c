"""Speed and resources: the figures are there, plausible, and say how they were got."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
from torch import nn

from deepseek.errors import ConfigError
from deepseek.evaluate import resources, speed

EXPECTED = [
    "first_token_s",
    "prefill_tokens_per_s",
    "token_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
    "cpu_s_per_token",
]


def names(found: object) -> list[str]:
    """Return the names of the measurements, energy left out."""
    return [each.name for each in found.measurements if each.name != "energy_j_per_token"]


def test_a_transformers_model_is_measured_through_its_generate(
    tiny: nn.Module, tokenizer: object
) -> None:
    options = {"num_prompt_tokens": 16, "num_new_tokens": 5, "num_repeats": 2}
    found = speed(tiny, tokenizer=tokenizer, **options)
    assert names(found) == EXPECTED
    assert [len(each.arrivals_s) for each in found.passes] == [5, 5]
    assert all(list(each.arrivals_s) == sorted(each.arrivals_s) for each in found.passes)
    values = {each.name: each for each in found.measurements}
    first = values["first_token_s"]
    assert first.spread is not None and first.spread.low <= first.value <= first.spread.high
    assert "not energy" in str(values["cpu_s_per_token"].conditions["method"])
    assert values["peak_rss_bytes"].conditions["method"]
    assert first.command == (
        "deepseek eval MODEL --tasks speed --prompt-tokens 16 --new-tokens 5 --repeats 2 --seed 0"
    )


def test_our_decoder_is_measured_through_stream() -> None:
    models = pytest.importorskip("deepseek.models")
    pytest.importorskip("deepseek.generate")
    config = models.DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=128,
    )
    options = {"num_prompt_tokens": 8, "num_new_tokens": 4, "num_repeats": 1, "num_warmups": 0}
    found = speed(models.Decoder(config).eval(), **options)
    assert names(found) == EXPECTED
    assert [len(each.arrivals_s) for each in found.passes] == [4]
    assert found.measurements[0].conditions["implementation"] == "deepseek"


def test_peak_memory_sees_what_is_gone_again() -> None:
    before = resources.current_rss_bytes()
    if before is None:
        pytest.skip("this system has no /proc/self/status")
    # pages of its own: an allocator may hand out memory that is resident already
    with resources.track() as usage, mmap.mmap(-1, 120_000_000) as held:
        held.write(b"1" * len(held))
        time.sleep(0.05)
    assert usage.peak_rss_bytes >= before + 100_000_000
    assert usage.wall_s >= 0.05
    assert "whole process" not in usage.peak_rss_method


def test_sampling_takes_over_where_the_mark_cannot_be_reset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if resources.current_rss_bytes() is None:
        pytest.skip("this system has no /proc/self/status")
    monkeypatch.setattr(resources, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with resources.track() as usage:
        time.sleep(0.02)
    assert usage.peak_rss_method == "largest of samples every 5 ms"
    assert usage.peak_rss_bytes > 0


def zone(folder: Path, name: str, energy_uj: int) -> Path:
    """Write a RAPL zone."""
    path = folder / name
    path.mkdir()
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text("10000000\n")
    return path


def test_energy_sums_packages_and_survives_a_wrap(tmp_path: Path) -> None:
    first, second = (
        zone(tmp_path, "intel-rapl:0", 1_000_000),
        zone(tmp_path, "intel-rapl:1", 9_500_000),
    )
    zone(tmp_path, "intel-rapl:0:0", 5)
    with resources.track(tmp_path) as usage:
        (first / "energy_uj").write_text("3000000")
        (second / "energy_uj").write_text("500000")
    assert usage.energy_j == pytest.approx(3.0)


def test_no_counter_no_joule(tmp_path: Path) -> None:
    with resources.track(tmp_path) as usage:
        pass
    assert usage.energy_j is None
    assert usage.cpu_s >= 0


def test_mistakes_are_explained(tiny: nn.Module) -> None:
    with pytest.raises(ConfigError, match="num_new_tokens of speed must be at least 2"):
        speed(tiny, num_new_tokens=1)
    with pytest.raises(ConfigError, match="at most 512 together"):
        speed(tiny, num_prompt_tokens=512)
    with pytest.raises(ConfigError, match="must be a deepseek Decoder"):
        speed(lambda ids: ids)

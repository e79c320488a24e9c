"""The family: counts, small sizes that run, and configs fitted to a target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.models import Decoder, DecoderConfig
from deepseek.models.families import config_from_hf, config_to_hf
from deepseek.models.presets import PRESETS, count_params, fit, preset, shrink

DOCUMENTS = {
    "base": 1.3e9,
    "7b": 7e9,
    "v1": 13e9,
    "v2": 32e9,
    "33b": 33e9,
    "lite": 13e9 / 5,
    "r1-8b": 8e9,
    "r1-67b": 67e9,
}
"""The counts that the founding documents state."""


@pytest.mark.parametrize("name", PRESETS)
def test_the_count_lies_within_three_per_cent(name: str) -> None:
    chosen = preset(name)
    assert abs(count_params(chosen.config) / chosen.num_params - 1) < 0.03
    assert chosen.stated == (name in DOCUMENTS)
    if chosen.stated:
        assert chosen.num_params == DOCUMENTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_tiny_and_small_of_each_run(name: str) -> None:
    full = preset(name).config
    for size, limit in (("tiny", 1_000_000), ("small", 60_000_000)):
        config = preset(name).sized(size)
        assert count_params(config) < limit
        assert (config.experts is None) == (full.experts is None)
        assert config.rope == full.rope
    model = Decoder(shrink(full, "tiny")).eval()
    tokens = torch.randint(0, 512, (1, 20))
    with torch.no_grad():
        cache = model.new_cache(1, 20)
        model(tokens[:, :19], cache=cache)
        last = model(tokens[:, 19:], cache=cache).logits
        torch.testing.assert_close(last, model(tokens).logits[:, -1:], rtol=1e-4, atol=1e-5)
    assert preset(name).sized("full") is full


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_written_and_read(name: str) -> None:
    config = preset(name).config
    assert config_from_hf(config_to_hf(config)) == config
    assert DecoderConfig.from_dict(config.to_dict()) == config


def test_an_unknown_preset_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"name of preset must be one of base, 7b, v1"):
        preset("v9")


@settings(max_examples=10, deadline=None)
@given(st.integers(15_000_000, 20_000_000_000))
def test_a_config_can_be_fitted_to_a_target(num_params: int) -> None:
    assert abs(count_params(fit(num_params)) / num_params - 1) < 0.03


def test_a_target_below_the_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_params of fit must be at least 9,437,184"):
        fit(1000)
    assert count_params(fit(1_000_000, vocab_size=512)) > 0

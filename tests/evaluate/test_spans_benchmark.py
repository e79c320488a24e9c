"""The benchmark of spans and segments: its costs, its windows, and the whole of it on a small
model."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import spans
from deepseek import hub
from deepseek.data import Tokenizer
from deepseek.errors import ConfigError
from deepseek.models import Decoder, SpanPlanner, Spans
from deepseek.ops.attention import DenseKV, Layout
from tests.generate.conftest import byte_tokenizer
from tests.models.zoo import TINY, randomize


def test_what_is_counted_is_what_is_seen() -> None:
    states = torch.zeros(1, 4, 200, 6)
    kv, layout = DenseKV(states[:, :2], states[:, :2]), Layout.dense(1, 200)
    known = Spans(reach=((3, 70, 20, 9),), first=5)
    counting = spans.Counting(SpanPlanner(known))
    assert counting.plan(0, states, kv, layout) is not None
    assert counting.seen == [pytest.approx(known.mean_seen(200))]
    assert known.mean_seen(200) < counting.listed[0] <= 256
    dense = spans.Counting(None)
    assert dense.plan(0, states, kv, layout) is None
    assert (dense.seen, dense.listed) == ([100.5], [200.0])


@pytest.mark.parametrize("seen", [70.0, 131.5, 500.0])
def test_a_window_costs_what_was_asked(seen: float) -> None:
    window = spans.window_of(TINY, seen, 1000).spans
    assert window.mean_seen(1000) == pytest.approx(seen, abs=1)
    assert len({reach for heads in window.reach for reach in heads}) == 1


def test_all_contenders_are_measured(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdef. \n", k=2600)))
    model = Decoder(TINY.replace(vocab_size=260, max_positions=1024)).eval()
    randomize(model)
    byte_tokenizer(eos_token="<end>").save(tmp_path)
    model.tokenizer = Tokenizer.from_folder(tmp_path)
    hub.save(model, tmp_path / "model")
    options = argparse.Namespace(
        model=str(tmp_path / "model"),
        dtype="float32",
        text=text,
        context=None,
        length=900,
        documents=2,
        probes=1,
        shares=[0.7],
        read=1,
    )
    with Progress(console=Console(quiet=True), disable=True) as bar:
        found = spans.run(options, bar)
    names = list(dict.fromkeys(each.conditions.get("contender") for each in found))
    assert names == [
        "dense",
        None,
        "segments",
        "window-as-segments",
        "segments-unlinked",
        "spans-0.7",
        "window-as-spans-0.7",
    ]
    figures = {(each.conditions.get("contender"), each.name): each.value for each in found}
    assert figures["dense", "perplexity_ratio"] == 1
    assert figures["dense", "tokens_seen"] == 450.5
    for name in ("segments", "spans-0.7"):
        assert figures[name, "perplexity_ratio"] != 1
        peer = figures[f"window-as-{name}", "tokens_seen"]
        assert peer == pytest.approx(figures[name, "tokens_seen"], abs=1)
        assert peer < 450
    assert figures["segments-unlinked", "tokens_seen"] <= figures["segments", "tokens_seen"]
    spans.show(found)


def test_a_text_that_is_too_short_is_told() -> None:
    with pytest.raises(ConfigError, match="text of the benchmark of spans must be at least 1024"):
        spans.documents(list(range(400)), 512, 2)

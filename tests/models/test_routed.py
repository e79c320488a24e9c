"""Routed attention through the modules: full budgets are dense, steps are as whole texts, and the
engine computes the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.cli.main import main
from deepseek.errors import ConfigError, FormatError
from deepseek.face import load, load_engine
from deepseek.generate import generate
from deepseek.models import Decoder, DecoderConfig, Pattern, RoutedPlanner, WindowPlanner
from deepseek.ops.attention import BlockTable, DenseKV, Layout
from deepseek.ops.attention.choice import choose_blocks
from deepseek.ops.routing import Routing
from tests.generate.conftest import byte_tokenizer
from tests.models.zoo import randomize
from tests.ops.native import NEEDS_KERNELS
from tests.tolerances import assert_logits_equal

SHAPE = DecoderConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_positions=1024,
)
FEW = Routing(
    refresh=4, first=1, recent=1, threshold=0, share=0.25, least=192, most=256, most_from=512
)
WORTH = dataclasses.replace(FEW, refresh=1, threshold=0.25)
JUDGED = dataclasses.replace(FEW, refresh=1, threshold=0.05, summaries=True)
ALL = Routing(refresh=4, least=192, most=1024, most_from=1024, share=1.0, recent=1)


def routed(routing: Routing, config: DecoderConfig = SHAPE) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config, planner=RoutedPlanner(config, routing)).eval()
    randomize(model)
    return model


def dense_of(model: Decoder) -> Decoder:
    dense = Decoder(model.config).eval()
    dense.load_state_dict(model.state_dict())
    return dense


def tokens(rows: int, count: int) -> torch.Tensor:
    return torch.randint(0, 300, (rows, count), generator=torch.Generator().manual_seed(1))


def test_a_budget_of_everything_is_dense_with_gradients() -> None:
    model = routed(ALL)
    dense, ids = dense_of(model), tokens(2, 420)
    for each in (model, dense):
        each.loss(ids, ids).backward()
    with torch.no_grad():
        assert_logits_equal(model(ids).logits, dense(ids).logits)
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("routing", [FEW, JUDGED])
def test_steps_and_chunks_are_as_whole_texts(routing: Routing, impl: str) -> None:
    model, ids = routed(routing), tokens(2, 460)
    model.impl = impl  # type: ignore[assignment]
    with torch.no_grad():
        expected = model(ids).logits
        assert float((dense_of(model)(ids).logits - expected)[:, 200:].abs().max()) > 1e-3
        cache = model.new_cache(2, 460)
        parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 131), (131, 430))]
        parts += [model(ids[:, at : at + 1], cache=cache).logits for at in range(430, 460)]
    assert_logits_equal(torch.cat(parts, 1), expected)


def test_a_row_goes_on_with_its_choice_when_others_leave() -> None:
    model, ids = routed(FEW), tokens(3, 330)
    with torch.no_grad():
        expected = model(ids).logits
        cache = model.new_cache(3, 330)
        model(ids[:, :321], cache=cache)  # 321 is the second slot of a group
        cache = cache.select([2])
        found = model(ids[2:, 321:], cache=cache).logits
    assert_logits_equal(found, expected[2:, 321:])


def test_ragged_rows_are_as_alone() -> None:
    model, ids = routed(FEW), tokens(2, 400)
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 290:] = 0
    with torch.no_grad():
        cache = model.new_cache(2, 400)
        found = model(ids, mask, cache=cache).logits
        assert_logits_equal(found[1:, :290], model(ids[1:, :290]).logits)
        assert_logits_equal(found[:1], model(ids[:1]).logits)


def test_later_tokens_change_nothing_before_them() -> None:
    model, ids = routed(FEW), tokens(1, 400)
    with torch.no_grad():
        expected = model(ids).logits
        for place in (250, 323, 399):
            other = ids.clone()
            other[:, place:] = 7
            assert_logits_equal(model(other).logits[:, :place], expected[:, :place])


def test_the_table_fits_and_is_within_the_budget() -> None:
    torch.manual_seed(2)
    layout = Layout.dense(2, 500)
    queries, keys = torch.randn(2, 4, 500, 16), torch.randn(2, 2, 500, 16)
    table = choose_blocks(queries, DenseKV(keys, keys), layout, FEW)
    table.check(layout, 4, 2)
    assert table.query_size == 4
    assert BlockTable.num_query_blocks(layout, 4) == 125
    own = torch.arange(125) * 4 // 64
    most = torch.tensor([FEW.blocks_seen(int(block)) for block in own])
    assert bool((table.counts <= most).all()) and bool((table.counts[..., 64:] == 3).all())
    fewer = choose_blocks(
        queries, DenseKV(keys, keys), layout, dataclasses.replace(FEW, threshold=0.5)
    )
    assert bool((fewer.counts <= table.counts).all()) and bool((fewer.counts < table.counts).any())


def test_windows_stay_windows() -> None:
    config = SHAPE.replace(window=40, window_layers=(1,))
    model = Decoder(config).eval()
    randomize(model)
    ids = tokens(1, 300)
    with torch.no_grad():
        expected = model(ids).logits
        assert isinstance(model.planner, WindowPlanner)
        model.planner = RoutedPlanner(config, ALL, model.planner)
        assert_logits_equal(model(ids).logits, expected)


@NEEDS_KERNELS
@pytest.mark.parametrize(("dim", "routing"), [(16, FEW), (64, FEW), (16, WORTH), (64, JUDGED)])
def test_the_engine_chooses_as_the_modules(dim: int, routing: Routing, tmp_path: Path) -> None:
    model = routed(routing, SHAPE.replace(head_dim=dim))
    model.tokenizer = byte_tokenizer()
    prompt = tokens(1, 380)[0].tolist()
    found = generate(model, prompt, max_tokens=24, ignore_eos=True)
    model.impl = "sdpa"
    assert generate(model, prompt, max_tokens=24, ignore_eos=True).token_ids == found.token_ids
    path = hub.save(model, tmp_path / "bundle", name="tiny").path
    loaded = load(path, attention=routing)
    assert generate(loaded, prompt, max_tokens=24, ignore_eos=True).token_ids == found.token_ids
    engine = load_engine(path, attention=routing, keep=False)
    assert engine is not None and engine.routing == routing
    assert generate(engine, prompt, max_tokens=24, ignore_eos=True).token_ids == found.token_ids
    assert load(path, attention="routed").planner.routing == Routing()  # type: ignore[union-attr]


@NEEDS_KERNELS
def test_a_bundle_records_its_routing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = routed(FEW)
    model.tokenizer = byte_tokenizer()
    prompt = tokens(1, 380)[0].tolist()
    expected = generate(model, prompt, max_tokens=8, ignore_eos=True).token_ids
    bundle = hub.save(model, tmp_path / "bundle", name="tiny")
    assert bundle.routing == FEW and hub.Bundle.open(bundle.path).routing == FEW
    for attention in ("auto", "sdpa"):
        loaded = load(bundle.path, attention=attention)  # type: ignore[arg-type]
        assert isinstance(loaded.planner, RoutedPlanner) and loaded.planner.routing == FEW
        assert loaded.impl == attention
        assert generate(loaded, prompt, max_tokens=8, ignore_eos=True).token_ids == expected
    engine = load_engine(bundle.path, keep=False)
    assert engine is not None and engine.routing == FEW
    assert generate(engine, prompt, max_tokens=8, ignore_eos=True).token_ids == expected
    again = hub.save(load(bundle.path), tmp_path / "again").routing
    assert again == FEW and hub.pull(str(bundle.path), to=tmp_path / "pulled").routing == FEW
    assert main(["show", str(bundle.path)]) == 0
    assert "routed: refresh 4, first 1" in " ".join(capsys.readouterr().out.split())


@NEEDS_KERNELS
def test_dense_overrides_what_a_bundle_records(tmp_path: Path) -> None:
    model = routed(FEW)
    model.tokenizer = byte_tokenizer()
    path = hub.save(model, tmp_path / "bundle", name="tiny").path
    dense = load(path, attention="dense")
    assert isinstance(dense, Decoder) and dense.planner is None
    engine = load_engine(path, attention="dense", keep=False)
    assert engine is not None and engine.routing is None
    ids = tokens(1, 380)
    with torch.no_grad():
        assert_logits_equal(dense(ids).logits, dense_of(model)(ids).logits)
    card = json.loads((hub.save(dense, tmp_path / "dense").path / "bundle.json").read_text())
    assert "attention" not in card and load(tmp_path / "dense").planner is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("recorded", "line"),
    [
        ("routed", "attention of .*bundle.json must be the fields of a Routing; got 'routed'"),
        ({"threshold": 2}, "threshold of Routing must be from 0 to below 1; got 2"),
        ({"budget": 7}, "a known name; got 'budget'"),
        ({"first": "one"}, "first of Routing"),
    ],
)
def test_a_card_that_records_no_routing_is_told(
    recorded: object, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hub.save(routed(FEW), tmp_path / "bundle", name="tiny").path
    card = json.loads((path / "bundle.json").read_text())
    (path / "bundle.json").write_text(json.dumps({**card, "attention": recorded}))
    with pytest.raises(FormatError, match=line):
        load(path)
    assert main(["show", str(path)]) == 2
    told = capsys.readouterr().err
    assert "bundle.json" in told and len(told.strip().splitlines()) == 1
    for attention in ("dense", "routed"):
        load(path, attention=attention)  # type: ignore[arg-type]


def test_a_pattern_is_neither_dense_nor_routed(tmp_path: Path) -> None:
    config = SHAPE.replace(family="deepseek_stack", pattern=Pattern())
    path = hub.save(Decoder(config), tmp_path / "bundle", name="tiny").path
    assert hub.Bundle.open(path).routing is None
    for attention in ("dense", "routed"):
        with pytest.raises(ConfigError, match="made for a static pattern"):
            load(path, attention=attention)  # type: ignore[arg-type]


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from deepseek.models import Encoder, EncoderConfig

    config = EncoderConfig(
        vocab_size=30, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16
    )
    path = hub.save(Encoder(config), tmp_path / "encoder", name="encoder").path
    with pytest.raises(ConfigError, match="attention of load must be"):
        load(path, attention="routed")


def test_a_token_that_may_see_all_sees_what_is_below_the_threshold() -> None:
    layout = Layout.dense(1, 1024)
    queries, keys = torch.randn(1, 2, 1024, 8), torch.randn(1, 1, 1024, 8)
    routing = Routing(threshold=0.99, recent=1, share=0.1, least=512, most=512)
    table = choose_blocks(queries, DenseKV(keys, keys), layout, routing)
    counts = table.counts[0, 0]
    assert counts[:512].tolist() == [slot // 64 + 1 for slot in range(512)]
    assert int(counts[512:].max()) < 8

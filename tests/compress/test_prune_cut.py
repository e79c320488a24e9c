"""Cutting a model: exact where nothing is lost, whole wherever it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compress.prune import Shape
from deepseek.compress.prune.cut import Anatomy, anatomy, cut, keep_best, steady_norms
from deepseek.compress.prune.search import parameters_cost
from deepseek.compress.prune.shape import filled, shape_of
from deepseek.errors import ConfigError, FormatError
from deepseek.generate.modules import engine_of
from deepseek.hub import load, save
from deepseek.models import Decoder, DecoderConfig, Encoder, RoutedPlanner
from deepseek.ops.cpu import why_missing
from tests.compress.prune import BERT, IDS, LLAMA, made, zero_read
from tests.models.zoo import ours, reference
from tests.tolerances import assert_logits_equal

needs_kernels = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def cut_to(
    model: Decoder | Encoder, shape: Shape, scores: list[torch.Tensor] | None = None, **layers: Any
) -> Decoder | Encoder:
    """Return a model cut to a shape, by scores that count down unless given."""
    found = anatomy(model)
    scores = scores or [-torch.arange(g.num_units).float() for g in found.groups]
    layer_scores = layers.get("layers", -torch.arange(model.config.num_layers).float())
    kept = keep_best(model, found, scores, layer_scores, shape)
    return cut(model, found, kept)


def marked(found: Anatomy, part: str, places: list[int]) -> list[torch.Tensor]:
    """Return scores by which some units of a part are the worst."""
    scores = [torch.ones(group.num_units) for group in found.groups]
    for score, each in zip(scores, found.parts, strict=True):
        if each == part:
            score[places] = 0
    return scores


def output(model: Decoder | Encoder) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits if isinstance(model, Decoder) else model(IDS).last_hidden_state


CASES = {
    "llama": LLAMA,
    "llama-biased": LLAMA.replace(hidden_size=36, qkv_bias=True, output_bias=True, mlp_bias=True),
    "qwen3-like": LLAMA.replace(family="qwen3", qk_norm=True, tie_embeddings=False),
    "window": LLAMA.replace(family="deepseek_stack", window=4, window_layers=(0, 2)),
    "bert": BERT,
}


@pytest.mark.parametrize("part", ["heads", "channels"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "bert"])
def test_units_that_nothing_reads_are_removed_without_a_trace(case: str, part: str) -> None:
    model = made(CASES[case])
    found = anatomy(model)
    places = [1] if part == "heads" else [0, 7, 8, 40]
    for group in found.of(part):
        for name, dim in group.read:
            zero_read(model, name, dim, group.kept_places((name, dim), torch.tensor(places)))
    size = shape_of(model.config).size(part)  # type: ignore[arg-type]
    assert size is not None
    smaller = cut_to(model, Shape(**{part: size - len(places)}), marked(found, part, places))
    assert_logits_equal(output(smaller), output(model))
    assert shape_of(smaller.config).size(part) == size - len(places)  # type: ignore[arg-type]


def test_channels_of_an_encoder_that_nothing_reads() -> None:
    model = made(BERT)
    found, places = anatomy(model), [3, 79]
    for group in found.of("channels"):
        for name, dim in group.read:
            zero_read(model, name, dim, torch.tensor(places))
    smaller = cut_to(model, Shape(channels=78), marked(found, "channels", places))
    assert_logits_equal(output(smaller), output(model))


@pytest.mark.parametrize("tied", [True, False])
def test_width_that_carries_nothing_is_removed_with_steady_norms(tied: bool) -> None:
    model = made(LLAMA.replace(tie_embeddings=tied))
    found, places = anatomy(model), [0, 9, 10, 31]
    (group,) = found.of("width")
    for name, dim in group.places:
        if not name.endswith("norm.weight"):
            zero_read(model, name, dim, torch.tensor(places))
    kept = keep_best(model, found, marked(found, "width", places), torch.ones(3), Shape(width=28))
    smaller = cut(model, found, kept)
    steady_norms(model, smaller, found, kept, lambda: output(model))
    assert_logits_equal(output(smaller), output(model))


def test_layers_that_add_nothing_are_removed() -> None:
    model = made(LLAMA)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    smaller = cut_to(model, Shape(layers=2), layers=torch.tensor([1.0, 0.0, 1.0]))
    assert_logits_equal(output(smaller), output(model))


def test_windows_go_with_their_layers() -> None:
    model = made(CASES["window"])
    smaller = cut_to(model, Shape(layers=2), layers=torch.tensor([0.0, 1.0, 1.0]))
    assert smaller.config.window_layers == (1,)


def test_experts_that_are_never_chosen_are_removed_without_a_trace() -> None:
    model = ours(reference("deepseek-v3-full-query"))
    found, places = anatomy(model), [2, 5]
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[places] = -100.0
    smaller = cut_to(model, Shape(experts=6), marked(found, "experts", places))
    assert smaller.config.experts is not None and smaller.config.experts.num_experts == 6
    ids = IDS % 97
    with torch.no_grad():
        assert_logits_equal(smaller(ids).logits, model(ids).logits)


def test_channels_of_experts_that_nothing_reads() -> None:
    model = ours(reference("qwen3-moe"))
    found, places = anatomy(model), [0, 5, 31]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[:, :, places] = 0
    scores = marked(found, "expert_channels", places)
    smaller = cut_to(model, Shape(expert_channels=29), scores)
    ids = IDS % 97
    with torch.no_grad():
        assert_logits_equal(smaller(ids).logits, model(ids).logits)


def test_groups_of_experts_go_whole() -> None:
    smaller = cut_to(ours(reference("deepseek-v3")), Shape(experts=3, expert_channels=16))
    experts = smaller.config.experts
    assert experts is not None
    assert (experts.num_experts, experts.num_groups, experts.width) == (6, 3, 16)
    assert torch.isfinite(smaller(IDS % 97).logits).all()


SHAPES: dict[str, Shape] = {
    "llama": Shape(width=36, heads=1, channels=60, layers=2),
    "llama-tied-mha": Shape(width=40, heads=3, channels=44),
    "llama-wide-heads": Shape(width=24, heads=1),
    "mistral-window": Shape(layers=2, channels=40),
    "qwen2": Shape(width=20, heads=1, layers=1),
    "qwen2-window": Shape(channels=72, heads=1),
    "qwen3": Shape(width=44, heads=1, channels=16),
    "qwen3-moe": Shape(experts=5, expert_channels=20, width=32, heads=1, layers=2),
    "qwen3-moe-mixed": Shape(experts=3, channels=40, layers=2),
    "deepseek-v3": Shape(experts=2, expert_channels=16, heads=3, width=40, layers=2),
}


@pytest.mark.parametrize("case", SHAPES)
def test_transformers_reads_what_was_cut(tmp_path: Path, case: str) -> None:
    import transformers

    smaller = cut_to(ours(reference(case)), SHAPES[case])
    save(smaller, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = IDS % 97
    with torch.no_grad():
        assert_logits_equal(smaller(ids).logits, theirs(ids).logits)
        assert torch.equal(load(tmp_path / "model")(ids).logits, smaller(ids).logits)


def test_transformers_reads_an_encoder_that_was_cut(tmp_path: Path) -> None:
    import transformers

    smaller = cut_to(made(BERT), Shape(width=24, channels=40, layers=2))
    assert smaller.config.num_heads == 2
    save(smaller, tmp_path / "model")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert_logits_equal(output(smaller), theirs(IDS).last_hidden_state)


def test_a_llama_that_transformers_would_refuse_becomes_a_mistral() -> None:
    assert cut_to(ours(reference("llama-tied-mha")), Shape(width=40)).config.family == "llama"
    smaller = cut_to(ours(reference("llama-tied-mha")), SHAPES["llama-tied-mha"])
    assert smaller.config.family == "mistral"
    biased = ours(reference("llama-mqa-biased"))
    with pytest.raises(ConfigError, match="a multiple of the 4 heads"):
        cut_to(biased, Shape(width=42))


@st.composite
def decoders(draw: st.DrawFn) -> tuple[DecoderConfig, Shape]:
    """Draw a config and a shape to cut it to."""
    kv_heads = draw(st.integers(2, 4))
    config = LLAMA.replace(
        family="deepseek_stack",
        vocab_size=90,
        hidden_size=draw(st.integers(8, 40)),
        num_layers=draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 8])),
        intermediate_size=draw(st.integers(5, 50)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )
    shape = Shape(
        layers=draw(st.integers(1, config.num_layers)),
        width=draw(st.integers(4, config.hidden_size)),
        heads=draw(st.integers(1, kv_heads)),
        channels=draw(st.integers(1, config.intermediate_size)),
    )
    return config, shape


@settings(max_examples=25, deadline=None)
@given(case=decoders())
def test_any_decoder_is_cut_to_any_shape(case: tuple[DecoderConfig, Shape]) -> None:
    config, shape = case
    model = made(config)
    cost = parameters_cost(model, anatomy(model))
    smaller = cut_to(model, shape)
    assert shape_of(smaller.config) == shape
    assert smaller.config.num_heads // shape.heads == config.num_heads // config.num_kv_heads
    count = sum(each.numel() for each in smaller.parameters())
    assert cost(filled(config, shape)) == pytest.approx(count)
    loss = smaller(IDS, labels=IDS).loss
    loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in smaller.parameters())
    assert all(float(each.grad.abs().sum()) > 0 for each in smaller.parameters())


@needs_kernels
@pytest.mark.parametrize("case", ["llama", "llama-biased", "qwen3-like"])
def test_the_engine_runs_what_was_cut(case: str) -> None:
    smaller = cut_to(made(CASES[case]), Shape(width=20, heads=2, channels=36, layers=2))
    engine = engine_of(smaller)
    assert engine is not None
    length = IDS.shape[1]
    pages = engine.new_pages(1)
    places = list(range(length))
    table = torch.zeros(1, 1, dtype=torch.int32).numpy()
    logits = engine.step(pages, IDS[0].tolist(), places, [0] * length, table, places)
    torch.testing.assert_close(torch.from_numpy(logits), output(smaller)[0], rtol=0, atol=2e-3)


def test_the_original_is_left_alone() -> None:
    model = made(LLAMA)
    before = output(model)
    smaller = cut_to(model, Shape(channels=40))
    with torch.no_grad():
        for each in smaller.parameters():
            each.zero_()
    assert torch.equal(output(model), before)


def test_what_is_no_weight_is_handed_on() -> None:
    model = made(LLAMA)
    model.impl = "reference"
    model.planner = RoutedPlanner(model.config)
    smaller = cut_to(model, Shape(layers=2))
    assert smaller.impl == "reference" and isinstance(smaller.planner, RoutedPlanner)
    assert not smaller.training


@pytest.mark.parametrize(
    ("config", "shape", "words"),
    [
        (LLAMA, Shape(width=33), "width of Shape must be from 1 to 32"),
        (LLAMA, Shape(layers=0), "layers of Shape"),
        (LLAMA, Shape(experts=2), "None for a model that has none"),
        (BERT, Shape(width=20), "a multiple of the 12 channels of a head"),
        (BERT, Shape(width=24, heads=3), "2 for an encoder of width 24"),
        (LLAMA.replace(positions="alibi", family="deepseek_stack"), Shape(heads=1), "no unit"),
    ],
)
def test_shapes_that_cannot_be_come_to(config: Any, shape: Shape, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cut_to(made(config), shape)


def test_more_experts_than_a_token_uses_are_kept() -> None:
    with pytest.raises(ConfigError, match="enough for the 2"):
        cut_to(ours(reference("qwen3-moe")), Shape(experts=1))


def test_a_family_that_cannot_express_it_is_refused() -> None:
    model = made(LLAMA.replace(family="mistral", window=4, window_layers=(0, 1)))
    with pytest.raises(FormatError, match="mistral"):
        cut_to(model, Shape(channels=40))

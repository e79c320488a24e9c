"""Gates of attention heads: nothing changes until they are trained, what is closed gives zeros, and
a bundle keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.face import load
from deepseek.models import (
    Decoder,
    Encoder,
    GateConfig,
    GateWatch,
    LatentConfig,
    Pattern,
    add_gates,
)
from deepseek.models.config import DecoderConfig, EncoderConfig
from deepseek.models.depth import keep_layers
from tests.models.zoo import CASES, TINY, ours, randomize, reference
from tests.tolerances import assert_close, assert_logits_equal

LATENT = LatentConfig(kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6)
KINDS = {
    "grouped": {},
    "window": {"window": 20, "window_layers": (0,)},
    "alibi": {"positions": "alibi"},
    "pattern": {"pattern": Pattern(recent=2, every=4, sparsity=0.7, block_size=16)},
    "latent": {"latent": LATENT},
}


def gated(threshold: float, **changes: object) -> Decoder:
    """Return a decoder in evaluation whose gates differ from token to token."""
    config = TINY.replace(family="deepseek_stack", gates=GateConfig(threshold=threshold), **changes)
    torch.manual_seed(0)
    model = Decoder(config).eval()
    randomize(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.head_gate.weight.normal_(0, 0.5)
    return model


def draw(rows: int = 2, length: int = 90) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_new_gates_gives_the_same_bits(case: str, dtype: torch.dtype) -> None:
    model = ours(reference(case)).to(dtype)
    tokens = torch.randint(0, 97, (2, 40))
    cache = model.new_cache(2, 50)
    with torch.no_grad():
        before, cached = model(tokens).logits, model(tokens, cache=cache).logits
        assert add_gates(model, GateConfig(threshold=0.5)) is model
        assert torch.equal(model(tokens).logits, before)
        assert torch.equal(model(tokens, cache=model.new_cache(2, 50)).logits, cached)
    assert model.config.family == "deepseek_stack" and model.config.gates is not None
    assert not any(module.training for module in model.modules())
    assert model.model.layers[0].self_attn.head_gate.weight.dtype == dtype


def test_a_model_from_scratch_begins_as_without_gates() -> None:
    tokens, found = draw(), []
    for gates in (None, GateConfig()):
        torch.manual_seed(3)
        found.append(Decoder(TINY.replace(gates=gates))(tokens).logits)
    assert torch.equal(*found)


def test_a_gate_is_a_factor_of_each_heads_output() -> None:
    """Against a model without gates whose output projection was scaled by hand."""
    model = Decoder(TINY).eval()
    randomize(model)
    tokens, factors = draw(), torch.tensor([0.25, 1.0, 1.5, 0.5])
    by_hand = Decoder(TINY).eval()
    by_hand.load_state_dict(model.state_dict())
    add_gates(model, GateConfig())
    with torch.no_grad():
        for plain, layer in zip(by_hand.model.layers, model.model.layers, strict=True):
            plain.self_attn.o_proj.weight *= factors.repeat_interleave(TINY.head_dim)
            layer.self_attn.head_gate.bias.copy_((factors / 2).logit())
        assert_logits_equal(model(tokens).logits, by_hand(tokens).logits)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_closed_head_gives_zeros(kind: str) -> None:
    """Against the reference with what is closed taken out by hand."""
    model, tokens = gated(0.9, **KINDS[kind]), draw()
    outputs: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        outputs.append(inputs[0])

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(keep)
    with torch.no_grad(), GateWatch(model) as watch:
        logits = model(tokens).logits
    closed = watch.count.closed
    assert 0.1 < watch.count.share < 0.9 and watch.count.total == 2 * 90 * 4 * 2
    heads = torch.stack(outputs).unflatten(-1, (4, -1))
    assert int((heads == 0).all(-1).sum()) == closed
    model.impl = "reference"
    with torch.no_grad():
        assert_logits_equal(model(tokens).logits, logits)
        add_gates(model, GateConfig(threshold=0.0))
        assert (model(tokens).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("splits", [[70], [1] * 70])
def test_values_of_closed_heads_are_not_read(splits: list[int]) -> None:
    """Those that are no numbers would show wherever they are multiplied, by zero too."""
    model, tokens = gated(0.5), draw(length=70)

    def read() -> torch.Tensor:
        cache = model.new_cache(2, 70)
        return torch.cat([model(part, cache=cache).logits for part in tokens.split(splits, 1)], 1)

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.head_gate.weight.zero_()
            layer.self_attn.head_gate.bias.copy_(torch.tensor([-9.0, -9.0, 0.0, 0.0]))
            layer.self_attn.v_proj.weight[: TINY.head_dim] = torch.inf
        assert bool(read().isfinite().all())
        model.model.layers[1].self_attn.head_gate.bias[1] = 0.0
        assert not read().isfinite().any()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_text_is_the_same_whole_in_chunks_and_token_by_token(kind: str) -> None:
    model, tokens = gated(0.9, **KINDS[kind]), draw()
    with torch.no_grad():
        expected = model(tokens).logits
        for splits in ([40, 50], [1] * 90):
            cache, found = model.new_cache(2, 90), []
            for part in tokens.split(splits, 1):
                found.append(model(part, cache=cache).logits)
            assert_logits_equal(torch.cat(found, 1), expected)


def test_padding_is_left_out_as_without_gates() -> None:
    model, tokens = gated(0.9), draw(length=30)
    mask = torch.ones_like(tokens)
    mask[1, :12] = 0
    with torch.no_grad():
        padded = model(tokens, mask, position_ids=torch.arange(30)[None] - 12 * (1 - mask[:, :1]))
        alone = model(tokens[1:, 12:]).logits
    assert_logits_equal(padded.logits[1:, 12:], alone)


def test_in_training_all_heads_are_computed() -> None:
    """Otherwise a closed gate would have no gradient to open by."""
    model, tokens = gated(0.9).train(), draw()
    with GateWatch(model) as watch:
        trained = model(tokens, labels=tokens)
    assert watch.count.closed == 0
    trained.loss.backward()
    assert bool((model.model.layers[0].self_attn.head_gate.weight.grad != 0).all())
    add_gates(model.eval(), GateConfig())
    assert_logits_equal(trained.logits, model(tokens).logits)


def test_the_mean_gate_has_the_gradient_of_its_definition() -> None:
    model, tokens = gated(0.0).double(), draw(length=5)
    with GateWatch(model) as watch:
        model.loss(tokens, tokens)
        model.loss(tokens, tokens)
    assert watch.count.total == 2 * 2 * 2 * 5 * 4
    layer = model.model.layers[1]
    states = layer.input_layernorm(model(tokens, output_hidden_states=True).hidden_states[1])
    gate = layer.self_attn.head_gate
    by_hand = torch.autograd.grad((2 * gate(states).sigmoid()).mean() / 2, gate.weight)[0]
    found = torch.autograd.grad(watch.by_token().mean(), gate.weight)[0]
    assert watch.by_token().shape == (2, 5)
    assert_close(found, by_hand, torch.float32)


def test_a_watch_asks_for_gates_and_for_a_pass() -> None:
    with pytest.raises(ConfigError, match=r"model of GateWatch must be one with gates.*add_gates"):
        GateWatch(Decoder(TINY))
    with pytest.raises(ConfigError, match="passes of GateWatch must be at least one"):
        GateWatch(gated(0.0)).by_token()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_bundle_keeps_gates(kind: str, tmp_path: Path) -> None:
    model, tokens = gated(0.9, **KINDS[kind]), draw()
    loaded = load(hub.save(model, tmp_path / "bundle", name="tiny").path)
    assert loaded.config == model.config and loaded.config.gates == GateConfig(threshold=0.9)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_gates_added_to_a_loaded_model_are_saved(tmp_path: Path) -> None:
    """A family that has no place for them becomes our own."""
    model = ours(reference("qwen3-moe"))
    path = hub.save(model, tmp_path / "plain", name="tiny").path
    wider = add_gates(load(path), GateConfig(threshold=0.1))
    again = load(hub.save(wider, tmp_path / "gated", name="tiny").path)
    tokens = torch.randint(0, 97, (1, 20))
    assert again.config.gates == GateConfig(threshold=0.1)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_gates_have_no_place_in_other_families(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"deepseek_stack.* or another value of gates"):
        hub.save(Decoder(TINY.replace(gates=GateConfig())), tmp_path / "bundle", name="tiny")


@pytest.mark.parametrize("threshold", [-0.1, 2.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold of GateConfig must be from 0 to below 2"):
        GateConfig(threshold=threshold)


def test_only_a_decoder_is_given_gates_and_nothing_else() -> None:
    config = EncoderConfig(
        vocab_size=50, hidden_size=24, num_layers=1, num_heads=2, intermediate_size=32
    )
    with pytest.raises(ConfigError, match="gates of add_gates must be a GateConfig"):
        add_gates(Decoder(TINY), 0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="threshold of GateConfig must be"):
        GateConfig(threshold="0.1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model of add_gates must be a decoder"):
        add_gates(Encoder(config), GateConfig())


def test_the_layers_that_are_kept_keep_their_gates() -> None:
    model, tokens = gated(0.9), draw()
    kept = keep_layers(model, [1]).eval()
    assert torch.equal(
        kept.model.layers[0].self_attn.head_gate.weight,
        model.model.layers[1].self_attn.head_gate.weight,
    )
    assert kept(tokens).logits.shape == (2, 90, 50)


def test_a_config_survives_the_trip_through_json() -> None:
    config = TINY.replace(gates=GateConfig(threshold=0.25))
    assert DecoderConfig.from_dict(config.to_dict()) == config

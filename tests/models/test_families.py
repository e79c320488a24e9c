"""Every decoder family against transformers, on random weights in float32."""

from __future__ import annotations

import json

import pytest
import torch

from deepseek.errors import FormatError
from deepseek.models import Decoder, DecoderConfig
from deepseek.models.families import (
    build_model,
    config_from_hf,
    config_to_hf,
    known_families,
    state_from_hf,
    state_to_hf,
)
from tests.models.zoo import CASES, ours, reference
from tests.tolerances import MODEL_LOGITS_ATOL, assert_logits_equal


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 37, 131])
def test_logits(case: str, length: int) -> None:
    theirs = reference(case)
    tokens = torch.randint(0, 97, (2, length))
    with torch.no_grad():
        assert_logits_equal(ours(theirs)(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding(case: str, side: str) -> None:
    theirs = reference(case)
    tokens = torch.randint(0, 97, (3, 75))
    mask = torch.ones(3, 75, dtype=torch.long)
    for row, padding in enumerate([0, 1, 41]):
        if padding:
            part = slice(0, padding) if side == "left" else slice(75 - padding, 75)
            mask[row, part] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
        actual = ours(theirs)(tokens, mask, positions).logits
    assert_logits_equal(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str) -> None:
    theirs = reference(case)
    model = ours(theirs)
    tokens = torch.randint(0, 97, (2, 35))
    labels = tokens.clone()
    labels[0, :5] = -100
    expected = theirs(tokens, labels=labels).loss
    actual = model(tokens, labels=labels).loss
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    actual.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    theirs_renamed = state_from_hf(model.config, grads)
    for name, parameter in model.named_parameters():
        if name in theirs_renamed:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(grad, theirs_renamed[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states(case: str) -> None:
    theirs = reference(case)
    tokens = torch.randint(0, 97, (1, 20))
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True).hidden_states
        actual = ours(theirs)(tokens, output_hidden_states=True).hidden_states
    assert actual is not None and len(actual) == len(expected)
    for mine, reference_state in zip(actual, expected, strict=True):
        assert_logits_equal(mine, reference_state)


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_equals_the_full_pass(case: str) -> None:
    model = ours(reference(case))
    tokens = torch.randint(0, 97, (2, 140))
    with torch.no_grad():
        expected = model(tokens).logits
        cache = model.new_cache(2, 140)
        parts = [model(tokens[:, :66], cache=cache).logits]
        parts += [model(tokens[:, 66:129], cache=cache).logits]
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(129, 140)]
    assert_logits_equal(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_ragged_batch_decodes_as_each_row_alone(case: str) -> None:
    model = ours(reference(case))
    lengths = [5, 70, 64]
    rows = [torch.randint(0, 97, (1, length + 3)) for length in lengths]
    batch, mask = torch.zeros(3, 70, dtype=torch.long), torch.zeros(3, 70)
    for row, length in enumerate(lengths):
        batch[row, :length], mask[row, :length] = rows[row][0, :length], 1
    with torch.no_grad():
        cache = model.new_cache(3, 80)
        steps = [model(batch, mask, cache=cache, last_only=True).logits]
        for step in range(3):
            token = torch.stack(
                [rows[r][0, n + step : n + step + 1] for r, n in enumerate(lengths)]
            )
            steps.append(model(token, cache=cache, last_only=True).logits)
        for row, length in enumerate(lengths):
            alone = model(rows[row]).logits[:, length - 1 :]
            together = torch.cat([step[row : row + 1] for step in steps], dim=1)
            assert_logits_equal(together, alone)
    assert cache.lengths == [8, 73, 67]


def test_dynamic_scaling_beyond_the_trained_context_equals_transformers() -> None:
    theirs = reference("llama-dynamic", max_position_embeddings=24)
    tokens = torch.randint(0, 97, (1, 61))
    with torch.no_grad():
        assert_logits_equal(ours(theirs)(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("case", CASES)
def test_config_and_weights_go_there_and_back(case: str, tmp_path) -> None:
    theirs = reference(case)
    model = ours(theirs)
    written = json.loads(json.dumps(config_to_hf(model.config)))
    assert config_from_hf(written) == model.config
    assert DecoderConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    (tmp_path / "config.json").write_text(json.dumps(written))
    from safetensors.torch import save_file

    state = {
        name: t.contiguous() for name, t in state_to_hf(model.config, model.state_dict()).items()
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 97, (1, 30))
    with torch.no_grad():
        assert_logits_equal(again(tokens).logits, theirs(tokens).logits)


def test_what_a_family_cannot_express_is_refused() -> None:
    config = config_from_hf(reference("llama").config.to_dict()).replace(qk_norm=True)
    with pytest.raises(FormatError, match=r"one that llama can express.*deepseek_stack"):
        config_to_hf(config)
    own = config.replace(family="deepseek_stack")
    assert config_from_hf(json.loads(json.dumps(config_to_hf(own)))) == own


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"model_type": "gpt2"}, "model_type of config.json must be one of bert, deepseek_stack"),
        ({"model_type": None}, "model_type of config.json"),
        ({"hidden_act": "gelu"}, "hidden_act of config.json"),
        ({"vocab_size": None}, "vocab_size of config.json must be given"),
        ({"num_key_value_heads": 3}, "num_kv_heads of DecoderConfig must be a divisor"),
        ({"hidden_size": "many"}, "a whole llama config"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type of config.json"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "a whole llama config"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(fields: dict, message: str) -> None:
    good = config_to_hf(config_from_hf(reference("llama").config.to_dict()))
    with pytest.raises(FormatError, match=message):
        config_from_hf(good | fields)
    assert "llama" in known_families()


def test_missing_experts_are_named() -> None:
    model = ours(reference("qwen3-moe"))
    state = state_to_hf(model.config, model.state_dict())
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(FormatError, match=r"layers\.1.*up_proj.*none for experts \[3\]"):
        state_from_hf(model.config, state)


def test_a_fresh_model_on_meta_allocates_nothing() -> None:
    config = config_from_hf(reference("deepseek-v3").config.to_dict())
    with torch.device("meta"):
        model = build_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    fresh = build_model(config)
    assert isinstance(fresh, Decoder)
    assert all(bool(parameter.isfinite().all()) for parameter in fresh.parameters())
    assert fresh.dtype == torch.float32 and fresh.device.type == "cpu"
    assert MODEL_LOGITS_ATOL <= 1e-4


def test_prediction_layers_are_left_out_and_other_routing_is_refused() -> None:
    model = ours(reference("deepseek-v3"))
    state = state_to_hf(model.config, model.state_dict())
    state["model.layers.3.eh_proj.weight"] = torch.zeros(1)
    assert "model.layers.3.eh_proj.weight" not in state_from_hf(model.config, state)
    written = config_to_hf(model.config)
    for field, value in (("scoring_func", "softmax"), ("moe_layer_freq", 2)):
        with pytest.raises(FormatError, match=f"{field} of config.json"):
            config_from_hf(written | {field: value})

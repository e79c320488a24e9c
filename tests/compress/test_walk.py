"""What is seen on the way through a model's layers."""

from __future__ import annotations

import torch

from deepseek.compress.calibration import Batch
from deepseek.compress.quantize.targets import layers_of
from deepseek.compress.quantize.walk import Flow, first_flows, grams, relative_error, through
from deepseek.models import Decoder, Encoder, ExpertsConfig
from deepseek.models.single_weights import weight_of
from tests.compress.small import WIDE, samples, small_decoder, small_encoder


def seen(model: Decoder | Encoder, batches: list[Batch]) -> tuple[list[Flow], torch.Tensor]:
    prefix, layers = layers_of(model)
    flows = first_flows(model, batches)
    name = next(n for n, each in model.named_modules() if isinstance(each, torch.nn.Linear))
    assert name.startswith(prefix)
    layer = layers[0]
    found = grams(
        lambda flow: layer(flow.states, flow.about),
        flows,
        {"first": model.get_submodule(name)},
        "float32",
    )
    return through(layer, flows, "float32"), found["first"]


def test_padding_counts_nowhere() -> None:
    model, batches = small_encoder(), samples(padded=True)
    assert all(each.attention_mask is not None for each in batches)
    others = [Batch(each.input_ids * each.attention_mask, each.attention_mask) for each in batches]
    (states, gram), (others_states, others_gram) = seen(model, batches), seen(model, others)
    torch.testing.assert_close(others_gram, gram)
    assert relative_error(states, others_states) < 1e-10
    assert not torch.allclose(states[0].states, others_states[0].states)
    flows = first_flows(model, batches)
    rows = torch.cat([flow.tokens(flow.states) for flow in flows])
    assert len(rows) == sum(int(each.attention_mask.sum()) for each in batches)
    torch.testing.assert_close(gram, rows.T @ rows / len(rows))


def test_layers_one_by_one_are_the_model() -> None:
    model, batches = small_decoder(), samples(2)
    flows = first_flows(model, batches)
    for layer in layers_of(model)[1]:
        flows = through(layer, flows, "float32")
    with torch.no_grad():
        for flow, batch in zip(flows, batches, strict=True):
            found = model.lm_head(model.model.norm(flow.states))
            torch.testing.assert_close(found, model(batch.input_ids).logits)


def test_an_experts_gram_is_of_the_tokens_that_chose_it() -> None:
    experts = ExpertsConfig(num_experts=4, num_active=2, width=32)
    model, batches = small_decoder(WIDE.replace(experts=experts)), samples(2)
    layer, flows = layers_of(model)[1][0], first_flows(model, batches)
    stack = model.get_submodule("model.layers.0.mlp.experts")
    found = grams(lambda f: layer(f.states, f.about), flows, {"e": stack}, "float32")
    given: list[tuple[torch.Tensor, ...]] = []
    handle = stack.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    through(layer, flows, "float32")
    handle.remove()
    tokens, chosen = (torch.cat([each[place] for each in given]) for place in (0, 1))
    for expert in range(4):
        rows = tokens[[expert in row for row in chosen.tolist()]]
        assert 0 < len(rows) < len(tokens)
        torch.testing.assert_close(found[f"e.{expert}.gate_proj"], rows.T @ rows / len(tokens))
        gate, up, down = (
            weight_of(model, f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight")
            for part in ("gate", "up", "down")
        )
        inner = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        assert inner.shape[1] == down.shape[1]
        torch.testing.assert_close(found[f"e.{expert}.down_proj"], inner.T @ inner / len(tokens))

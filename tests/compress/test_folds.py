"""Factors that move between neighbours leave a model's outputs as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek.compress import Calibration, Work
from deepseek.compress.quantize import Equalize
from deepseek.compress.quantize.awq import scale_salient
from deepseek.compress.quantize.equalize import apply, equalize, input_ranges
from deepseek.compress.quantize.folds import apply_fold, folds
from deepseek.compress.quantize.grid import Grid, round_weight
from deepseek.errors import ConfigError
from deepseek.models import Decoder, Encoder, ExpertsConfig, GateConfig, LatentConfig
from tests.compress.small import WIDE, samples, small_decoder, small_encoder
from tests.tolerances import MODEL_LOGITS_ATOL

EXPERTS = ExpertsConfig(num_experts=4, num_active=2, width=32, num_shared=1, dense_layers=(0,))
LATENT = LatentConfig(query_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=12)
MODELS = {
    "llama": WIDE,
    "tied": WIDE.replace(tie_embeddings=True),
    "biased": WIDE.replace(qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True),
    "one kv head": WIDE.replace(num_kv_heads=1),
    "gates": WIDE.replace(family="deepseek_stack", gates=GateConfig()),
    "experts": WIDE.replace(experts=EXPERTS),
    "latent": WIDE.replace(latent=LATENT),
    "latent, full query": WIDE.replace(
        latent=LatentConfig(**{**LATENT.__dict__, "query_rank": None})
    ),
}


def model_of(name: str) -> Decoder | Encoder:
    if name == "encoder":
        return small_encoder()
    model = small_decoder(MODELS[name])
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "head_gate.weight")):
            torch.nn.init.normal_(parameter.data, std=0.3)
    return model


def outputs(model: Decoder | Encoder) -> torch.Tensor:
    batch = samples(1, padded=isinstance(model, Encoder))[0]
    with torch.no_grad():
        found = model(*batch)
    return found.last_hidden_state if isinstance(model, Encoder) else found.logits


@pytest.mark.parametrize("name", [*MODELS, "encoder"])
def test_a_factor_anywhere_changes_nothing(name: str) -> None:
    model = model_of(name).double()
    before = outputs(model)
    places = folds(model)
    for place in places:
        channels = model.get_parameter(place.producers[0]).shape[0]
        apply_fold(model, place, torch.exp(torch.randn(channels, dtype=torch.float64) / 2))
    after = outputs(model)
    assert not torch.equal(after, before)
    assert float((after - before).abs().max()) < 1e-11 * float(before.abs().max())
    seen = [consumer for place in places for consumer in place.consumers]
    assert len(seen) == len(set(seen))


def test_every_product_of_a_plain_layer_has_a_fold() -> None:
    model = model_of("llama")
    consumers = {name for place in folds(model) for name in place.consumers}
    products = {
        f"{name}.weight" for name, each in model.named_modules() if hasattr(each, "in_features")
    }
    assert consumers == products


@pytest.mark.parametrize("name", ["llama", "tied", "gates", "latent", "encoder"])
def test_equalizing_leaves_the_outputs_and_brings_channels_together(name: str) -> None:
    model = model_of(name)
    expected = outputs(model)
    before, after = equalize(model, samples(), 0.5)
    assert float((outputs(model) - expected).abs().max()) < MODEL_LOGITS_ATOL
    assert after < before


def test_equalized_channels_are_as_the_source_says() -> None:
    model = model_of("llama")
    place = folds(model)[0]
    inputs = input_ranges(model, samples(), [place.sees])[place.sees]
    names = place.consumers
    weights = torch.stack([model.get_parameter(each).abs().amax(0) for each in names]).amax(0)
    norm = model.get_parameter(place.producers[0]).detach().clone()
    equalize(model, samples(), 0.25)
    factor = norm / model.get_parameter(place.producers[0]).detach()
    torch.testing.assert_close(factor, (inputs**0.25 / weights**0.75).detach())


def test_the_stage_measures_and_refuses(tmp_path: Path) -> None:
    calibration = Calibration(samples=4, length=32)
    stage = Equalize(calibration=calibration)
    assert Equalize.from_dict(stage.to_dict()) == stage
    work = Work(model=model_of("llama"), start=tmp_path, folder=tmp_path)
    before, after = apply(stage, work)
    assert after.value < before.value
    assert after.name == "input_range_spread_after"
    with pytest.raises(ConfigError, match="strength"):
        Equalize(strength=1.5)


def test_salient_channels_keep_the_function_and_round_better() -> None:
    model, grid = model_of("llama"), Grid(4, 32, False)
    expected, ids = outputs(model), samples(1)[0].input_ids
    place = folds(model)[0]
    grids = dict.fromkeys(place.consumers, grid)
    kept: list[torch.Tensor] = []
    module = model.get_submodule(place.sees)
    handle = module.register_forward_pre_hook(lambda _, given: kept.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
        grams = {place.sees: kept[0].T @ kept[0]}
        plain = error_of(model, place.consumers, grid, grams[place.sees])
        scale_salient(model, [place], grids, grams)
        model(ids)
    handle.remove()
    assert float((outputs(model) - expected).abs().max()) < MODEL_LOGITS_ATOL
    torch.testing.assert_close(grams[place.sees], kept[1].T @ kept[1], rtol=1e-3, atol=1e-3)
    assert error_of(model, place.consumers, grid, grams[place.sees]) < plain


def error_of(model: Decoder, names: tuple[str, ...], grid: Grid, gram: torch.Tensor) -> float:
    error = 0.0
    for name in names:
        weight = model.get_parameter(name).data
        change = round_weight(weight, grid).values() - weight
        error += float(((change @ gram) * change).sum())
    return error

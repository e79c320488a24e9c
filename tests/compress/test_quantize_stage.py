"""The stage: what lies on a grid behind it, how well, and how it goes on after a stop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import hub
from deepseek.compress import Calibration, Work
from deepseek.compress.quantize import EndToEnd, Learned, MixedBits, Quantize
from deepseek.compress.quantize.kept import KeptLayers
from deepseek.compress.quantize.stage import apply, quantize
from deepseek.compress.quantize.targets import Model, units
from deepseek.errors import CapacityError, ConfigError
from deepseek.generate.modules import why_no_engine
from deepseek.hub import Quantized
from deepseek.models import ExpertsConfig
from deepseek.models.single_weights import single_weights, weight_of
from tests.compress.small import WIDE, samples, small_decoder, small_encoder

QUICK: dict[str, Any] = {
    "learned": Learned(steps=15, rate=0.02, scale_rate=0.002),
    "end_to_end": EndToEnd(steps=10, rate=1e-3),
    "precision": "float32",
}


def work_of(model: Model, folder: Path, **changes: Any) -> Work:
    return Work(model=model, start=folder, folder=folder, **changes)


def value_of(outcome: Any, name: str) -> float:
    return next(each.value for each in outcome if each.name == name)


@pytest.mark.parametrize("method", ["round", "awq", "gptq", "learned"])
@pytest.mark.parametrize("kind", ["decoder", "tied", "encoder"])
def test_every_product_and_embedding_lies_on_its_grid(
    method: str, kind: str, tmp_path: Path
) -> None:
    tied = WIDE.replace(tie_embeddings=True)
    model = {"encoder": small_encoder, "tied": lambda: small_decoder(tied)}.get(
        kind, small_decoder
    )()
    work = work_of(model, tmp_path)
    stage = Quantize(method=method, **QUICK)
    outcome = quantize(stage, work, samples(padded=kind == "encoder"))
    matrices = {name for name, each in model.named_parameters() if each.dim() == 2}
    assert set(work.quantized) == matrices
    assert ("lm_head.weight" in matrices) == (kind == "decoder")
    for name, weight in work.quantized.items():
        assert torch.equal(model.get_parameter(name).data, weight.values())
        is_inner = ".layers." in name or ".layer." in name
        assert (weight.bits, weight.is_symmetric) == ((4, False) if is_inner else (8, True))
        assert weight.group == (32 if is_inner else weight.codes.shape[1])
    total = sum(each.num_bytes for each in work.quantized.values())
    assert value_of(outcome, "quantized_weight_bytes") == total
    rest = sum(each.numel() for each in model.parameters() if each.dim() == 1)
    assert value_of(outcome, "numbers_not_quantized") == rest


def test_each_method_is_nearer_to_the_model_than_the_one_before(tmp_path: Path) -> None:
    errors = []
    for method in ("round", "gptq", "learned"):
        settings = {**QUICK, "learned": Learned(steps=60, rate=0.02), "end_to_end": None}
        stage = Quantize(method=method, **settings)
        outcome = quantize(stage, work_of(small_decoder(), tmp_path / method), samples(8))
        errors.append(value_of(outcome, "layer_output_error_last"))
    assert errors[0] > errors[1] > errors[2] > 0


def test_eight_bits_lose_far_less(tmp_path: Path) -> None:
    errors = []
    for bits in (4, 8):
        stage = Quantize(bits=bits, method="round", precision="float32")
        outcome = quantize(stage, work_of(small_decoder(), tmp_path), samples())
        errors.append(value_of(outcome, "layer_output_error_last"))
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize("method", ["round", "gptq", "learned"])
def test_weights_of_eight_bits_are_rotated_where_their_width_allows(
    method: str, tmp_path: Path
) -> None:
    bits = 4 if method == "learned" else 8
    stage = Quantize(
        bits=bits, group=32 if bits == 4 else None, method=method, rotate=True, **QUICK
    )
    for again in (False, True):  # the second time from the kept layers
        work = work_of(small_decoder(), tmp_path)
        assert (KeptLayers(tmp_path, stage, 0).read(1) is not None) == again
        quantize(stage, work, samples())
        for name, weight in work.quantized.items():
            assert weight.is_rotated == (weight.bits == 8 and weight.codes.shape[1] == 64), name
            assert torch.equal(work.model.get_parameter(name).data, weight.values())


def test_what_is_usual_is_rotated_only_where_that_can_be() -> None:
    assert Quantize.usual(8).rotate and Quantize.usual(8, group=64, method="gptq").rotate
    others = ({"group": 32}, {"head_group": 32}, {"method": "learned"}, {"rotate": False})
    assert not any(Quantize.usual(8, **settings).rotate for settings in others)
    assert Quantize.usual(4) == Quantize()


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("method", {"bits": 8, "group": None, "method": "learned"}),
        ("method", {"method": "awq", "mixed": MixedBits(budget_bytes=10**6)}),
        ("group", {"bits": 8, "group": 32, "method": "round"}),
        ("head_group", {"head_group": 32}),
    ],
)
def test_what_is_not_rotated_is_refused(word: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=word):
        Quantize(rotate=True, **settings)


ROUTED = WIDE.replace(
    family="deepseek_stack",
    experts=ExpertsConfig(num_experts=4, num_active=2, width=32, num_shared=1),
)


@pytest.mark.parametrize("method", ["round", "awq", "gptq", "learned"])
def test_routed_experts_lie_on_grids_one_by_one(method: str, tmp_path: Path) -> None:
    model = small_decoder(ROUTED)
    before = dict(copy.deepcopy(model.state_dict()))
    work = work_of(model, tmp_path)
    outcome = quantize(Quantize(method=method, **QUICK), work, samples())
    matrices = {
        name
        for name, each in single_weights(model)
        if each.dim() == 2 and not name.endswith(".gate.weight")  # not the router
    }
    assert set(work.quantized) == matrices
    for name, weight in work.quantized.items():
        assert torch.equal(weight_of(model, name), weight.values()), name
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        assert not torch.equal(model.get_parameter(name), before[name])
    rest = sum(each.numel() for name, each in single_weights(model) if name not in matrices)
    assert value_of(outcome, "numbers_not_quantized") == rest
    units_of = [unit for unit in units(model) if unit.is_routed]
    assert [len(unit.modules) for unit in units_of] == [8, 4] * ROUTED.num_layers
    bundle = hub.save(model, tmp_path / "b", quantized=Quantized(weights=work.quantized))
    loaded = hub.load(bundle.path)
    assert set(hub.quantized_weights(bundle)) == matrices
    assert all(torch.equal(each, model.state_dict()[n]) for n, each in loaded.state_dict().items())
    assert why_no_engine(loaded) is None


def test_experts_are_rounded_by_what_their_own_tokens_are(tmp_path: Path) -> None:
    """Each method's error is less than that of the one before; one expert that nobody chose is
    rounded all the same."""
    errors = []
    for method in ("round", "gptq", "learned"):
        model = small_decoder(ROUTED)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.get_parameter("mlp.gate.weight")[3] = 0
                layer.get_parameter("mlp.gate.weight")[:3] = torch.randn(3, 64) * 9
        settings = {**QUICK, "learned": Learned(steps=60, rate=0.02), "end_to_end": None}
        work = work_of(model, tmp_path / method)
        outcome = quantize(Quantize(method=method, **settings), work, samples(8))
        errors.append(value_of(outcome, "layer_output_error_last"))
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in work.quantized
    assert errors[0] > errors[1] > errors[2] > 0


def test_experts_have_their_bits_together(tmp_path: Path) -> None:
    whole = sum(each.numel() for each in small_decoder(ROUTED).parameters())
    budget = MixedBits(budget_bytes=int(0.9 * whole))
    work = work_of(small_decoder(ROUTED), tmp_path)
    quantize(Quantize(method="round", mixed=budget), work, samples())
    for unit in units(work.model):
        assert len({work.quantized[name].bits for name in unit.weights}) == 1
    assert {work.quantized[name].bits for name in work.quantized} == {4, 8}


def test_ignored_weights_stay(tmp_path: Path) -> None:
    model = small_decoder()
    before = copy.deepcopy(model.state_dict())
    work = work_of(model, tmp_path)
    stage = Quantize(method="gptq", ignore=("lm_head*", "*.0.self_attn.*"))
    quantize(stage, work, samples())
    left = {"lm_head.weight"} | {f"model.layers.0.self_attn.{each}_proj.weight" for each in "qkvo"}
    assert set(work.quantized) == {name for name, each in before.items() if each.dim() == 2} - left
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in left)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["awq", "learned"])
def test_a_stopped_run_goes_on_behind_its_layers_to_the_same_end(
    method: str, tmp_path: Path
) -> None:
    stage = Quantize(method=method, **QUICK)
    whole = work_of(small_decoder(), tmp_path / "whole")
    quantize(stage, whole, samples())

    def stop(words: str, share: float | None) -> None:
        if words.startswith("layer 2"):
            raise Stopped

    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        quantize(stage, work_of(small_decoder(), folder, report=stop), samples())
    assert [path.name for path in folder.iterdir()] == ["layer-0.pt"]
    other = Quantize(method=method, damping=0.02, **QUICK)
    assert KeptLayers(folder, other, 0).read(0) is None
    again = work_of(small_decoder(), folder)
    quantize(stage, again, samples())
    for name, weight in whole.quantized.items():
        assert torch.equal(again.quantized[name].codes, weight.codes)
        assert torch.equal(again.quantized[name].scale, weight.scale)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter)


def test_a_layer_file_that_is_cut_off_is_made_again(tmp_path: Path) -> None:
    stage = Quantize(method="gptq", **QUICK)
    first = work_of(small_decoder(), tmp_path)
    quantize(stage, first, samples())
    path = tmp_path / "layer-1.pt"
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert KeptLayers(tmp_path, stage, 0).read(1) is None
    again = work_of(small_decoder(), tmp_path)
    quantize(stage, again, samples())
    assert all(
        torch.equal(again.quantized[name].codes, each.codes)
        for name, each in first.quantized.items()
    )


def test_mixed_bits_keep_the_budget_and_lose_less_than_four(tmp_path: Path) -> None:
    sizes, errors = [], []
    for mixed in (None, 0.85, 0.95):
        work = work_of(small_decoder(), tmp_path)
        budget = None if mixed is None else MixedBits(budget_bytes=int(mixed * whole_bytes()))
        outcome = quantize(Quantize(method="round", mixed=budget), work, samples())
        rest = 4 * value_of(outcome, "numbers_not_quantized")
        sizes.append(value_of(outcome, "quantized_weight_bytes") + rest)
        errors.append(value_of(outcome, "layer_output_error_last"))
        if budget is not None:
            assert sizes[-1] <= budget.budget_bytes
            by_unit = [
                {work.quantized[name].bits for name in unit.weights} for unit in units(work.model)
            ]
            assert all(len(bits) == 1 for bits in by_unit)
    assert sizes[0] < sizes[1] < sizes[2]
    assert errors[0] > errors[1] > errors[2]


def whole_bytes() -> int:
    """Return what a model of 8 bits takes, about."""
    return sum(each.numel() for each in small_decoder().parameters())


def test_a_budget_that_is_too_small_is_refused(tmp_path: Path) -> None:
    stage = Quantize(method="round", mixed=MixedBits(budget_bytes=1000))
    with pytest.raises(CapacityError, match="budget"):
        quantize(stage, work_of(small_decoder(), tmp_path), samples())


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divisor of the 64 channels"):
        quantize(Quantize(group=128), work_of(small_decoder(), tmp_path), samples())
    with pytest.raises(ConfigError, match="ignore"):
        units(small_decoder(), ("*",))
    with pytest.raises(ConfigError, match="damping"):
        Quantize(damping=0.0)
    work = work_of(small_decoder(), tmp_path)
    work.model.tokenizer = None
    with pytest.raises(ConfigError, match="tokenizer"):
        apply(Quantize(), work)


def test_the_stage_is_data_and_runs_on_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words, again and again. " * 40)
    calibration = Calibration(text=str(text), samples=8, length=16)
    stage = Quantize(method="gptq", calibration=calibration, mixed=None)
    assert Quantize.from_dict(stage.to_dict()) == stage
    assert Quantize.from_dict({"method": "learned", "learned": {"steps": 3}}).learned.steps == 3
    shares: list[float | None] = []
    work = work_of(small_decoder(), tmp_path, report=lambda words, share: shares.append(share))
    outcome = apply(stage, work)
    assert shares[-1] == 1.0
    assert value_of(outcome, "layer_output_error_median") < 0.05
    assert stage.why_not_after([stage]) is not None


def test_units_are_the_engines_instructions() -> None:
    model = small_decoder(WIDE.replace(tie_embeddings=True))
    first = [unit.modules for unit in units(model) if unit.layer in (None, 0)]
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert first == [
        ("model.embed_tokens",),
        tuple(f"{attention}.{each}_proj" for each in "qkv"),
        (f"{attention}.o_proj",),
        (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        (f"{mlp}.down_proj",),
    ]

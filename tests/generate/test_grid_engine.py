"""The engine on weights that keep the grids of their bundle, against the plain arithmetic."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import deepseek
from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.face import engine_facts, load_engine
from deepseek.generate import Engine, build_engine, generate
from deepseek.generate.cost import cost_of_step
from deepseek.generate.flat import decoder_program, sharing_weights
from deepseek.generate.modules import engine_of, grids_kept, weights_of, why_no_engine
from deepseek.hub import Quantized
from deepseek.models import Decoder
from deepseek.ops.cpu import why_missing
from deepseek.ops.linear import Linear
from deepseek.ops.linear.reference import grid_linear_reference
from deepseek.ops.quantized import QuantizedWeight
from deepseek.ops.scheme import Scheme
from tests.generate.test_flat import draw, whole
from tests.grids import Kind, put_on_grids, rounded
from tests.models.zoo import ours, reference
from tests.ops.native import ISAS

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

Kinds = dict[str, Kind]
GRIDS: dict[str, Kinds] = {
    "int4": {"": (4, 32, False)},
    "int8 by rows": {"": (8, None, True)},
    "int8 rotated": {"": (8, None, True, True)},
    "mixed": {
        "embed": (8, 32, True),
        "lm_head": (8, None, True),
        "down": (8, None, True, True),
        "o_proj": (4, 64, True),
        "": (4, 32, False),
    },
    "int8 static": {"embed": (8, None, True), "": (8, None, True, False, 0.01)},
    "mixed static": {
        "embed": (8, None, True, True),
        "down": (8, 64, True, True, 0.002),
        "o_proj": (4, 64, True, False, 0.02),
        "lm_head": (8, 64, True),
        "mlp": (8, 32, True),
        "": (4, 32, False, False, 0.03),
    },
    "linear": {"self_attn": (4, 32, True), "mlp": (8, 32, True)},
}
CASES = ["wide", "wide-tied"]


def wide(tied: bool) -> Decoder:
    """Return a decoder whose widths are multiples of 64, with biases on query, key and value."""
    from tests.hub.tiny import tiny_decoder

    sizes = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 97, "head_dim": 32}
    model = tiny_decoder(**sizes, tie_word_embeddings=tied, attention_bias=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.08)
    return model


def bundle(
    folder: Path, kinds: Kinds, *, tied: bool = False, layout: str = "compressed-tensors"
) -> dict[str, QuantizedWeight]:
    model = wide(tied)
    weights = put_on_grids(model, kinds)
    hub.save(model, folder, quantized=Quantized(weights=weights, layout=layout))  # type: ignore[arg-type]
    return weights


class OnGrid(Linear):
    """A linear layer in the arithmetic of the engine."""

    grid: QuantizedWeight

    def forward(self, input: Tensor) -> Tensor:
        """Return the product: [..., in] to [..., out]."""
        flat = input.flatten(0, -2)
        found = grid_linear_reference(flat, self.grid, self.bias)
        return found.unflatten(0, input.shape[:-1])


def plain(model: Decoder, weights: dict[str, QuantizedWeight]) -> Decoder:
    """Return a copy that computes as the engine does."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        weight = weights.get(f"{name}.weight")
        if name == "lm_head" and copied.config.tie_embeddings:
            weight = weights.get("model.embed_tokens.weight")
        if isinstance(module, Linear) and weight is not None:
            module.__class__ = OnGrid
            vars(module)["grid"] = weight
    return copied


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grids", GRIDS)
def test_logits_are_those_of_the_plain_arithmetic(
    tmp_path: Path, grids: str, tied: bool, isa: str
) -> None:
    weights = bundle(tmp_path, GRIDS[grids], tied=tied)
    model = hub.load(tmp_path)
    assert isinstance(model, Decoder)
    scheme = Scheme(as_stored=True, kv="float32")
    engine = build_engine(
        model.config, weights_of(model, model.grids), scheme, instruction_set=isa, threads=2
    )
    sequences = draw([3, 90])
    found = whole(engine, sequences, [70, 1])
    exact = plain(model, weights)
    for tokens, logits in zip(sequences, found, strict=True):
        with torch.inference_mode():
            expected = exact(torch.tensor([tokens])).logits[0].numpy()
        size = np.abs(expected).max()
        off = np.abs(logits - expected)
        # a level in the middle between two may be rounded either way, and is felt from there on
        assert np.median(off) <= 1e-6 * size
        assert off.max() <= 0.02 * size


def test_the_plain_arithmetic_is_told_from_its_neighbours(tmp_path: Path) -> None:
    """What the test above allows is far less than what another grid or no grid makes."""
    bundle(tmp_path, GRIDS["int4"])
    model = hub.load(tmp_path)
    assert isinstance(model, Decoder)
    sequences = draw([90])
    kept = whole(engine_as(model, Scheme(as_stored=True, kv="float32")), sequences, [90])[0]
    for other in (Scheme(weights="float32", kv="float32"), Scheme.named("int8")):
        off = np.abs(whole(engine_as(model, other), sequences, [90])[0] - kept)
        assert np.median(off) > 1e-3 * np.abs(kept).max()


def tokens_of(source: Decoder | Engine) -> tuple[int, ...]:
    """Return a few greedy tokens."""
    found = generate(source, [5, 7, 11], max_tokens=12, ignore_eos=True)
    assert not isinstance(found, list)
    return tuple(found.token_ids)


def engine_as(model: Decoder, scheme: Scheme) -> Engine:
    return build_engine(model.config, weights_of(model, model.grids), scheme)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grids", GRIDS)
def test_loaded_models_generate_as_stored_with_torch_and_without(
    tmp_path: Path, grids: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    folder = tmp_path / "bundle"
    bundle(folder, GRIDS[grids], tied=tied)
    model = deepseek.load(folder)
    assert isinstance(model, Decoder)
    expected = tokens_of(model)
    held = engine_of(model)
    assert held is not None
    assert held.scheme.name == "stored"
    for was_packed in (False, True):
        engine = load_engine(folder)
        assert engine is not None
        assert engine.was_packed == was_packed
        assert engine.weight_bytes == held.weight_bytes
        assert tokens_of(engine) == expected
    for (name, one), (_, other) in zip(held.packed_parts(), engine.packed_parts(), strict=True):
        assert one == other, name


def test_another_scheme_is_packed_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    folder = tmp_path / "bundle"
    bundle(folder, GRIDS["int4"])
    names = []
    for scheme in (None, "int8", None, "bfloat16"):
        engine = load_engine(folder, scheme=scheme)
        assert engine is not None
        names.append((engine.scheme.name, engine.was_packed))
    assert names == [("stored", False), ("int8", False), ("stored", True), ("bfloat16", False)]
    model = deepseek.load(folder, scheme="int8")
    held = engine_of(model)
    assert held is not None
    assert held.scheme.name == "int8"


def test_a_grid_that_stays_in_the_file_changes_the_file_that_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another bundle in the place of one is packed anew."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    folder = tmp_path / "bundle"
    bundle(folder, GRIDS["int4"])
    first = load_engine(folder)
    bundle(folder, GRIDS["int8 by rows"])
    second = load_engine(folder)
    assert first is not None
    assert second is not None
    assert not second.was_packed
    assert second.weight_bytes > first.weight_bytes


def test_the_cache_is_as_the_card_says(tmp_path: Path) -> None:
    model = wide(tied=True)
    weights = put_on_grids(model, GRIDS["int4"])
    hub.save(model, tmp_path, quantized=Quantized(weights=weights, kv="int8"))
    engine = load_engine(tmp_path, keep=False)
    held = engine_of(deepseek.load(tmp_path))
    assert engine is not None
    assert held is not None
    assert engine.scheme.name == held.scheme.name == "stored-kv8"
    hub.save(model, tmp_path, quantized=Quantized(weights={}, kv="int8"))
    engine = load_engine(tmp_path, keep=False)
    assert engine is not None
    assert engine.scheme == Scheme.named("float32").replace(kv="int8")


def test_weights_that_were_changed_are_computed_as_they_are(tmp_path: Path) -> None:
    bundle(tmp_path, GRIDS["int4"])
    model = deepseek.load(tmp_path)
    assert isinstance(model, Decoder)
    assert set(grids_kept(model)) == set(model.grids)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(grids_kept(copied)) == set(model.grids)
        held = engine_of(copied)
        assert held is not None
        assert held.scheme.as_stored
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1
    held = engine_of(model)
    assert held is not None
    assert held.scheme.name == "float32"


def test_a_model_in_bfloat16_keeps_its_grids(tmp_path: Path) -> None:
    bundle(tmp_path, GRIDS["int8 by rows"])
    held = engine_of(deepseek.load(tmp_path, dtype="bfloat16"))
    assert held is not None
    assert held.scheme.as_stored


MIXTURES: dict[str, tuple[Kinds, str]] = {
    "query and key": ({"q_proj": (8, 32, True), "": (4, 32, False)}, "q_proj"),
    "gate and up": ({"up_proj": (4, 64, True), "": (4, 32, True)}, "up_proj"),
    "turned or not": ({"q_proj": (8, None, True, True), "": (8, None, True)}, "q_proj"),
    "no such group": ({"down": (4, 16, True), "": (4, 32, False)}, "groups that"),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_mixtures_that_the_engine_has_not_run_through_the_modules(
    tmp_path: Path, case: str
) -> None:
    kinds, word = MIXTURES[case]
    bundle(tmp_path, kinds)
    assert load_engine(tmp_path, keep=False) is None
    model = deepseek.load(tmp_path)
    assert isinstance(model, Decoder)
    for reason in (engine_facts(tmp_path).reason, why_no_engine(model)):
        assert reason is not None
        assert word in reason
    assert engine_of(model) is None
    assert generate(model, [5, 7], max_tokens=3, ignore_eos=True)
    with pytest.raises(ConfigError, match="alike in a product"):
        engine_as(model, Scheme(as_stored=True))
    rounded_anew = load_engine(tmp_path, scheme="int8", keep=False)
    assert rounded_anew is not None


def test_numbers_that_float16_does_not_hold_run_through_the_modules(tmp_path: Path) -> None:
    model = wide(tied=False)
    weights = put_on_grids(model, GRIDS["int4"])
    name = "model.layers.0.mlp.down_proj.weight"
    weight = weights[name]
    long_scale = weight.scale.half().float() * 1.123
    weights[name] = QuantizedWeight(4, weight.codes, long_scale.half().float(), weight.zero)
    hub.save(model, tmp_path, quantized=Quantized(weights=weights))
    assert load_engine(tmp_path, keep=False) is None
    loaded = deepseek.load(tmp_path)
    for reason in (engine_facts(tmp_path).reason, why_no_engine(loaded)):
        assert reason is not None
        assert f"{name} has zero points" in reason
    assert engine_of(loaded) is None


def test_units_share_inputs() -> None:
    program = decoder_program(ours(reference("qwen3-moe")).config)
    units = sharing_weights(program)
    layer = "model.layers.0"
    assert tuple(f"{layer}.self_attn.{part}_proj.weight" for part in "qkv") in units
    experts = [unit for unit in units if any(".experts." in name for name in unit)]
    assert all(
        all("down" in name for name in unit) or all("down" not in name for name in unit)
        for unit in experts
    )


def test_experts_on_grids(tmp_path: Path) -> None:
    """One by one in the folder, stacked in the model, alike in the engine."""
    model = ours(reference("qwen3-moe"))
    weights = {}
    for layer in range(model.config.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        both = model.get_parameter(f"{prefix}.gate_up_proj").data
        downs = model.get_parameter(f"{prefix}.down_proj").data
        for index in range(len(both)):
            parts = (*both[index].chunk(2), downs[index])
            for part, values in zip(("gate", "up", "down"), parts, strict=True):
                weight = rounded(values, 8, values.shape[1], symmetric=True)
                weights[f"{prefix}.{index}.{part}_proj.weight"] = weight
                values.copy_(weight.values())
    hub.save(model, tmp_path, quantized=Quantized(weights=weights))
    loaded = deepseek.load(tmp_path)
    assert isinstance(loaded, Decoder)
    assert len(grids_kept(loaded)) == len(weights)
    expected = tokens_of(loaded)
    engine = load_engine(tmp_path, keep=False)
    assert engine is not None
    assert tokens_of(engine) == expected
    with torch.inference_mode():
        exact = loaded(torch.tensor([[5, 7, 11]])).logits[0]
    found = whole(engine, [[5, 7, 11]], [3])[0]
    assert np.median(np.abs(found - exact.numpy())) < 0.02 * exact.abs().max()


@pytest.mark.parametrize("grids", GRIDS)
def test_what_is_counted_is_what_the_engine_holds(tmp_path: Path, grids: str) -> None:
    bundle(tmp_path, GRIDS[grids], tied=True)
    facts = engine_facts(tmp_path)
    assert facts.scheme is not None
    assert facts.reason is None
    assert facts.scheme.as_stored
    program = decoder_program(wide(tied=True).config)
    costs = cost_of_step(program, facts.shapes, facts.scheme, forms=facts.forms)
    engine = load_engine(tmp_path, keep=False)
    assert engine is not None
    counted = sum(cost.weight_bytes for cost in costs)
    assert counted <= engine.weight_bytes <= 1.04 * counted
    integers = [cost for cost in costs if cost.storage in ("int4", "int8") and cost.weight_bytes]
    assert all("of the bundle" in cost.kernel.why for cost in integers)


@pytest.mark.parametrize("kinds", [(4, 32, False), (8, 64, True)])
def test_gptq_folders_run_too(tmp_path: Path, kinds: tuple[int, int, bool]) -> None:
    bundle(tmp_path, {"self_attn": kinds, "mlp": kinds}, layout="gptq")
    model = deepseek.load(tmp_path)
    assert isinstance(model, Decoder)
    engine = load_engine(tmp_path, keep=False)
    assert engine is not None
    assert engine.scheme.as_stored
    expected = tokens_of(model)
    assert tokens_of(engine) == expected

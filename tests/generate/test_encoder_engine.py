"""The engine of an encoder against the modules it is made from, and when there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek
from deepseek.errors import ConfigError, ShapeError
from deepseek.face import load_encoder_engine
from deepseek.generate import EncoderEngine, build_encoder_engine
from deepseek.generate.encoder_modules import encoder_engine_of, why_no_encoder_engine
from deepseek.generate.flat_encoder import encoder_program
from deepseek.generate.modules import weights_of
from deepseek.models import Encoder
from deepseek.ops.scheme import Scheme
from tests.generate.encoders import TINY_ENCODER, tiny_encoder
from tests.ops.native import ISAS, NEEDS_KERNELS
from tests.tolerances import assert_logits_equal

pytestmark = NEEDS_KERNELS

LENGTHS = [1, 64, 5, 200, 65, 33]


def built(model: Encoder, scheme: str = "float32", **settings: object) -> EncoderEngine:
    named = Scheme.named(scheme)
    return build_encoder_engine(model.config, weights_of(model), named, **settings)


def draw(lengths: list[int] = LENGTHS) -> tuple[list[list[int]], list[list[int]]]:
    texts = [torch.randint(0, 260, (length,)).tolist() for length in lengths]
    return texts, [torch.randint(0, 2, (length,)).tolist() for length in lengths]


def expected(model: Encoder, text: list[int], types: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found = model(torch.tensor([text]), token_type_ids=torch.tensor([types]))
    return found.last_hidden_state[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_states_equal_the_modules(activation: str, isa: str) -> None:
    model = tiny_encoder(activation=activation)
    texts, types = draw()
    found = built(model, instruction_set=isa).states(texts, types)
    for states, text, each in zip(found, texts, types, strict=True):
        assert_logits_equal(torch.from_numpy(states), expected(model, text, each))


@pytest.mark.parametrize("changes", [{"num_heads": 1, "hidden_size": 96}, {"num_types": 1}])
def test_other_shapes_equal_the_modules(changes: dict[str, int]) -> None:
    """One wide head, and a single token type."""
    if "num_types" in changes:
        changes = {"num_token_types": changes["num_types"], "norm_eps": 1e-5}
    model = tiny_encoder(**changes)
    texts, _ = draw([70, 3])
    for states, text in zip(built(model).states(texts), texts, strict=True):
        assert_logits_equal(torch.from_numpy(states), expected(model, text, [0] * len(text)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", ["float32", "bfloat16", "int8-row", "int4-g64", "int8-kv8"])
def test_a_text_does_not_depend_on_its_companions(scheme: str, isa: str) -> None:
    """Bit by bit: alone or in a batch, on one thread or three; the first token's state alone."""
    model = tiny_encoder()
    texts, _ = draw()
    one = built(model, scheme, threads=1, instruction_set=isa)
    three = built(model, scheme, threads=3, instruction_set=isa)
    together = three.states(texts)
    firsts = one.first_states(texts)
    for text, states, first in zip(texts, together, firsts, strict=True):
        assert np.array_equal(one.states([text])[0], states)
        assert np.array_equal(first, states[0])


@pytest.mark.parametrize(("scheme", "least"), [("bfloat16", 0.999), ("int8", 0.995), ("int4", 0.8)])
def test_states_in_few_bits_are_near(scheme: str, least: float) -> None:
    model = tiny_encoder(hidden_size=128, intermediate_size=192)
    texts, types = draw()
    for text, each in zip(texts, types, strict=True):
        (states,) = built(model, scheme).states([text], [each])
        likeness = torch.cosine_similarity(
            torch.from_numpy(states).flatten(), expected(model, text, each).flatten(), dim=0
        )
        assert likeness > least


@pytest.mark.parametrize("isa", ISAS)
def test_logits_equal_the_modules(isa: str) -> None:
    model = tiny_encoder(labels=("no", "yes", "perhaps"))
    texts, types = draw()
    engine = built(model, instruction_set=isa)
    found = engine.logits(texts, types)
    for row, text, each in zip(found, texts, types, strict=True):
        with torch.inference_mode():
            wanted = model(torch.tensor([text]), token_type_ids=torch.tensor([each])).logits[0]
        assert_logits_equal(torch.from_numpy(row), wanted)
    whole = engine.states(texts, types)  # the head is left out, whatever it is
    assert_logits_equal(torch.from_numpy(whole[3]), expected(model, texts[3], types[3]))


def test_many_texts_take_several_steps() -> None:
    """More tokens than a step holds, and more texts than there are pages."""
    model = tiny_encoder()
    texts, _ = draw([200] * 4 + [2] * 40)
    engine = built(model)
    assert engine.native.max_tokens < sum(map(len, texts))
    assert engine.pages.num_pages < len(texts)
    for states, text in zip(engine.states(texts), texts, strict=True):
        assert_logits_equal(torch.from_numpy(states), expected(model, text, [0] * len(text)))
    assert engine.states([]) == []


def test_bad_texts_are_refused() -> None:
    engine = built(tiny_encoder())
    for text in ([], [1] * 201):
        with pytest.raises(ShapeError, match="text of EncoderEngine must be from 1 to 200"):
            engine.states([[5], text])
    with pytest.raises(ShapeError, match="types of EncoderEngine"):
        engine.states([[5, 6]], [[0]])
    with pytest.raises(ConfigError, match="token outside the vocabulary"):
        engine.states([[5, 260]])
    with pytest.raises(ConfigError, match="token type outside the table"):
        engine.states([[5, 6]], [[0, 2]])
    with pytest.raises(ConfigError, match="one with a classifier"):
        engine.logits([[5]])
    with pytest.raises(ConfigError, match="tokenizer of EncoderEngine"):
        engine.embed(["text"])


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_equal_the_modules(pooling: str, normalize: bool) -> None:
    model = tiny_encoder(pooling=pooling, normalize=normalize, max_embed_tokens=90)
    texts = ["a cat", "", "a long text " * 30, "dog"]
    engine = encoder_engine_of(model)
    assert_logits_equal(torch.from_numpy(engine.embed(texts)), model.embed(texts))


def test_a_scheme_lets_the_model_run_on_its_engine(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    deepseek.save(tiny_encoder(labels=("cat", "dog")), folder)
    texts = ["miaow", "bow wow", "a text of some length " * 4]
    plain, model = deepseek.load(folder), deepseek.load(folder, scheme="int8")
    assert isinstance(plain, Encoder) and isinstance(model, Encoder)
    found = model.embed(texts)
    assert vars(model)["engine_slot"].engine.scheme.name == "int8"
    assert torch.cosine_similarity(found, plain.embed(texts)).min() > 0.99
    assert model.classify(texts) == plain.classify(texts)
    engine = load_encoder_engine(folder, scheme="int8")
    assert np.array_equal(engine.embed(texts), found.numpy())
    assert engine.classify(texts) == model.classify(texts)


def test_a_changed_weight_is_packed_anew() -> None:
    model = tiny_encoder()
    before = encoder_engine_of(model)
    assert encoder_engine_of(model) is before
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    text = [1, 7, 2]
    after = encoder_engine_of(model).states([text])[0]
    assert_logits_equal(torch.from_numpy(after), expected(model, text, [0, 0, 0]))


def test_reasons_for_no_engine() -> None:
    model = tiny_encoder()
    assert why_no_encoder_engine(model) is None
    model.use_attention("reference")
    assert "'reference' of attention" in str(why_no_encoder_engine(model))
    assert "room for 256" in str(why_no_encoder_engine(tiny_encoder(hidden_size=260, num_heads=1)))
    assert "float16" in str(why_no_encoder_engine(tiny_encoder().half()))
    hooked = tiny_encoder()
    hooked.encoder.layer[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="has forward hooks"):
        encoder_engine_of(hooked)


def test_what_is_no_encoder_bundle_is_refused(tmp_path: Path) -> None:
    from deepseek import hub
    from deepseek.models import Decoder
    from tests.models.zoo import TINY

    hub.save(Decoder(TINY), tmp_path / "decoder")
    with pytest.raises(ConfigError, match="got 'a decoder'"):
        load_encoder_engine(tmp_path / "decoder")
    hub.save(tiny_encoder().half(), tmp_path / "half")
    with pytest.raises(ConfigError, match="weights of load_encoder_engine"):
        load_encoder_engine(tmp_path / "half")
    assert load_encoder_engine(tmp_path / "half", scheme="float32").threads > 0


def test_it_loads_no_torch(tmp_path: Path) -> None:
    deepseek.save(tiny_encoder(), tmp_path / "bundle")
    code = (
        "import sys; from deepseek.face import load_encoder_engine as load\n"
        f"print(load({str(tmp_path / 'bundle')!r}).embed(['a text']).shape, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert run.stdout == "(1, 40) False\n"


def test_the_program_reads_well() -> None:
    lines = encoder_program(TINY_ENCODER).text().splitlines()
    assert len(lines) == 2 + 7 * 3 + 2
    assert lines[-1].endswith("logits = copy(last; )")

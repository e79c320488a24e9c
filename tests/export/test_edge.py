"""The edge profile: what is chosen fits, what does not fit is refused, and the limits are kept."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from deepseek import hub
from deepseek.engines import load_engine
from deepseek.errors import CapacityError, ConfigError
from deepseek.export import EdgeModel, EdgeProfile, optimize_for_edge, plan_for_edge
from deepseek.export import edge as edge_module
from deepseek.generate import Piece, Sampling, generate
from deepseek.ops.cpu import default_threads, why_missing
from tests.grids import put_on_grids
from tests.hub.tiny import tiny_decoder, tiny_tokenizer
from tests.models.zoo import ours, reference

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hub.save(ours(reference("llama")), tmp_path / "model")
    return tmp_path / "model"


def test_everything_fits_where_there_is_room(folder: Path) -> None:
    plan = plan_for_edge(folder)
    assert (plan.scheme.name, plan.rows, plan.context) == ("int8-kv8", 8, 256)
    assert plan.threads == default_threads() and plan.pages == 8 * 4
    assert plan.peak_bytes <= plan.limit_bytes <= 4_000_000_000
    assert set(plan.to_dict()) >= {"weights_bytes", "cache_bytes", "peak_bytes", "scheme"}
    assert "int8-kv8" in plan.text and "MiB" in plan.text


def test_less_room_takes_rows_then_bits_then_context(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.evaluate.resources.current_rss_bytes", lambda: 0)
    monkeypatch.setattr(edge_module, "LEAST_CONTEXT", 64)
    whole = plan_for_edge(folder).peak_bytes
    chosen: list[tuple[str, int, int]] = []
    for less in range(0, MIB, 4096):
        try:
            plan = plan_for_edge(folder, EdgeProfile(memory_bytes=whole - less))
        except CapacityError as error:
            least = int(re.search("at least ([0-9,]+) bytes", str(error))[1].replace(",", ""))
            assert least > whole - less
            break
        assert plan.peak_bytes <= whole - less
        pick = (plan.scheme.weights, plan.rows, plan.context)
        if pick not in chosen:
            chosen.append(pick)
    rows = [each[1] for each in chosen if each[0] == "int8"]
    assert rows == [8, 4, 2, 1]
    assert chosen.index(("int8", 1, 256)) < chosen.index(("int4", 1, 256))
    assert [each[2] for each in chosen if each[:2] == ("int4", 1)] == [256, 128, 64]


def test_what_cannot_fit_is_refused_before_a_weight_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.engines.load_engine", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(CapacityError, match=r"must be at least [\d,]+ bytes, for int4-kv8") as one:
        optimize_for_edge(folder, EdgeProfile(memory_bytes=1000))
    assert "\n" not in str(one.value) and "profile's cap" in str(one.value)


def test_the_limit_of_a_control_group_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.ops.cgroup.cgroup_memory", lambda: (12345, 100))
    with pytest.raises(CapacityError, match=r"12,345 .the control group's limit"):
        plan_for_edge(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dynamic_batching": 17}, "from 1 to 16"),
        ({"dynamic_batching": 0}, "from 1 to 16"),
        ({"memory_bytes": 0}, "memory_bytes of EdgeProfile"),
        ({"memory_bytes": 5e8}, "whole number"),
        ({"threads": True}, "threads of EdgeProfile"),
        ({"scheme": "int3"}, "scheme of EdgeProfile"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EdgeProfile(**settings)


def test_a_context_beyond_the_models_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="at most the model's 256 tokens; got 300"):
        plan_for_edge(folder, EdgeProfile(context=300))


def test_profiles_go_through_files() -> None:
    profile = EdgeProfile(memory_bytes=512 * MIB, scheme="int4", context=128)
    assert EdgeProfile.from_dict(profile.to_dict()) == profile


def test_what_is_asked_for_is_kept(folder: Path) -> None:
    asked = EdgeProfile(scheme="bfloat16", context=100, dynamic_batching=3, threads=1)
    plan = plan_for_edge(folder, asked)
    found = (plan.scheme.name, plan.context, plan.rows, plan.threads)
    assert found == ("bfloat16", 100, 3, 1)


def test_answers_are_those_of_the_engine_and_rows_stay_within_the_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = optimize_for_edge(folder, EdgeProfile(dynamic_batching=2, threads=1))
    prompts = [[5, 7, 11], [3], [9, 9], [1, 2, 3, 4], [8]]
    sampling = Sampling(temperature=1.0, seed=3)
    engine = load_engine(folder, scheme="int8-kv8", threads=1)
    assert engine is not None
    expected = generate(engine, prompts, max_tokens=6, sampling=sampling)
    seen: list[int] = []
    real = generate

    def counted(one: Any, part: Any, **settings: Any) -> Any:
        seen.append(len(part))
        return real(one, part, **settings)

    monkeypatch.setattr("deepseek.generate.generate", counted)
    pieces: list[Piece] = []
    found = model.generate(prompts, max_tokens=6, sampling=sampling, on_piece=pieces.append)
    assert isinstance(found, list) and isinstance(expected, list)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert seen == [2, 2, 1] and {piece.row for piece in pieces} == set(range(5))
    alone = model.generate(prompts[0], max_tokens=6, sampling=sampling)
    assert not isinstance(alone, list) and alone.token_ids == expected[0].token_ids


def test_texts_longer_than_the_context_are_refused(folder: Path) -> None:
    model = optimize_for_edge(folder, EdgeProfile(context=64))
    with pytest.raises(CapacityError):
        model.generate([5] * 65)
    answer = model.generate([5] * 60, max_tokens=100)
    assert not isinstance(answer, list) and len(answer.token_ids) <= 4


@pytest.mark.parametrize("case", ["llama-yarn", "llama-llama3", "llama-linear", "qwen2-window"])
def test_stretched_positions_and_windows_go_on(tmp_path: Path, case: str) -> None:
    hub.save(ours(reference(case)), tmp_path / "a")
    model = optimize_for_edge(tmp_path / "a", EdgeProfile(context=64, scheme="float32"))
    engine = load_engine(tmp_path / "a", scheme="float32")
    assert engine is not None
    found, expected = (generate(each, [5, 7], max_tokens=20) for each in (model.engine, engine))
    assert not isinstance(found, list) and not isinstance(expected, list)
    assert found.token_ids == expected.token_ids


def test_a_decoder_in_memory_keeps_its_changed_weights(folder: Path) -> None:
    model = hub.load(folder)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    asked = EdgeProfile(scheme="float32", threads=1)
    changed, plain = (optimize_for_edge(each, asked) for each in (model, folder))
    assert isinstance(changed, EdgeModel)
    one, other = (each.generate([5, 7, 11], max_tokens=12) for each in (changed, plain))
    assert one.token_ids != other.token_ids


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_a_bundle_on_a_grid_keeps_it(tmp_path: Path, layout: Any) -> None:
    model = tiny_decoder()
    model.tokenizer = tiny_tokenizer()
    weights = put_on_grids(model, {"proj": (4, 32, False)})
    hub.save(model, tmp_path / "a", quantized=hub.Quantized(weights=weights, layout=layout))
    found = optimize_for_edge(tmp_path / "a")
    assert found.plan.scheme.as_stored and found.plan.scheme.kv == "int8"
    for source in hub.load(tmp_path / "a").grids.values():
        tracemalloc.start()
        source.read()
        count = source.shape[0] * source.shape[1]
        assert tracemalloc.get_traced_memory()[1] <= 3 * count + 64 * 1024
        tracemalloc.stop()


def test_models_without_an_engine_are_refused(tmp_path: Path, minilm_folder: Path) -> None:
    hub.save(ours(reference("deepseek-v3")), tmp_path / "latent")
    for place, words in ((tmp_path / "latent", "latent"), (minilm_folder, "encoder")):
        with pytest.raises(ConfigError, match=words):
            plan_for_edge(place)
    with pytest.raises(ConfigError, match="a folder"):
        (tmp_path / "a.gguf").write_bytes(b"")
        plan_for_edge(tmp_path / "a.gguf")


@pytest.mark.parametrize("part", ["weights_bytes", "states_bytes", "cache_bytes"])
def test_a_lie_of_the_accounting_is_found_when_the_model_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from deepseek.generate import footprint

    real = footprint.engine_footprint

    def lying(*args: Any, **settings: Any) -> Any:
        return dataclasses.replace(real(*args, **settings), **{part: 10})

    monkeypatch.setattr(footprint, "engine_footprint", lying)
    with pytest.raises(CapacityError, match="fault of the accounting"):
        optimize_for_edge(folder)


def test_torch_is_not_loaded(folder: Path) -> None:
    code = (
        "import sys; from deepseek.export import optimize_for_edge\n"
        "found = optimize_for_edge(sys.argv[1]).generate([5, 7], max_tokens=3)\n"
        "assert found.token_ids and 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

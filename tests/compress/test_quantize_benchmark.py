"""The benchmark of quantization: the order of channels, its gates, and the whole of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compress_quantize as benchmark
from benchmarks.peers import weight_quantizers
from benchmarks.quality import WINDOW, rounding_error
from deepseek import hub
from deepseek.compress.quantize import Learned
from deepseek.errors import ConfigError
from deepseek.models import ExpertsConfig
from deepseek.ops.linear.reference import round_int4
from tests.compress.small import WIDE, small_decoder


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"qkv_bias": True, "mlp_bias": True, "num_kv_heads": 1}],
)
def test_another_order_of_channels_keeps_the_function_and_leaves_the_grid(
    changes: dict[str, object],
) -> None:
    model = small_decoder(WIDE.replace(**changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter.data)
        if ".layers." in name and parameter.dim() == 2:
            parameter.data = round_int4(parameter.data, 32)
    ids = torch.randint(256, (2, 20))
    moved = copy.deepcopy(model).double()
    benchmark.put_in_another_order(moved)
    with torch.no_grad():
        torch.testing.assert_close(moved(ids).logits, model.double()(ids).logits)
    assert rounding_error(model.float()) < 1e-4
    assert rounding_error(moved.float()) > 1e-3


def test_unknown_parts_are_refused() -> None:
    model = small_decoder(
        WIDE.replace(experts=ExpertsConfig(num_experts=2, num_active=1, width=32))
    )
    with pytest.raises(ConfigError, match="as-is"):
        benchmark.put_in_another_order(model)


def test_it_measures_every_recipe_and_fails_above_a_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    hub.save(small_decoder(WIDE.replace(max_positions=WINDOW)), folder, name="small")
    text.write_text("some words, and then some others. " * 70)
    quick = benchmark.RECIPES["learned-int4"].replace(learned=Learned(steps=2), end_to_end=None)
    recipes = {**benchmark.RECIPES, "learned-int4": quick}
    monkeypatch.setattr(benchmark, "RECIPES", recipes)
    chosen = ["round-int8", "round-int4", "gptq-int4", "learned-int4"]
    words = ["--model", str(folder), "--text", str(text), "--tokens", "1024", "--recipes", *chosen]
    words += ["--calibrate", str(text), "--other", str(text), "--gate", "round-int4=0.1", "--json"]
    assert benchmark.main(words) == 1
    printed = json.loads(capsys.readouterr().out)
    ratios = {
        each["conditions"]["scheme"]: each["value"]
        for each in printed["measurements"]
        if each["name"] == "perplexity_ratio"
    }
    assert list(ratios) == chosen
    assert abs(ratios["round-int8"] - 1) < abs(ratios["round-int4"] - 1)
    assert printed["over_gates"] and "round-int4" in printed["over_gates"][0]
    assert benchmark.main(words[:-3]) == 0
    assert "learned-int4" in capsys.readouterr().out


def test_other_programs_are_measured_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that changes nothing but the head, in place of those that are not installed here."""

    def unchanged(model: Any, rows: Sequence[torch.Tensor]) -> Any:
        assert all(row.dtype is torch.int64 for row in rows)
        weight_quantizers._round_heads(model)
        return model

    monkeypatch.setitem(weight_quantizers.KINDS, "torchao-int8", (8, 2, unchanged))
    monkeypatch.setitem(weight_quantizers._MODULES, "torchao", "torch")
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    hub.save(small_decoder(WIDE.replace(max_positions=WINDOW)), folder, name="small")
    text.write_text("some words, and then some others. " * 70)
    words = ["--model", str(folder), "--text", str(text), "--tokens", "1024", "--json"]
    assert benchmark.main([*words, "--recipes", "round-int8", "--others", "torchao-int8"]) == 0
    found = {
        (each["conditions"]["scheme"], each["name"]): each["value"]
        for each in json.loads(capsys.readouterr().out)["measurements"]
        if "scheme" in each["conditions"]
    }
    divergence = [found[name, "kl_divergence"] for name in ("torchao-int8", "round-int8")]
    assert 0 < divergence[0] < divergence[1]
    sizes = [found[name, "quantized_weight_bytes"] for name in ("torchao-int8", "round-int8")]
    assert sizes[0] == sizes[1]


def test_a_program_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(weight_quantizers._MODULES, "nncf", "no_such_module")
    assert benchmark.main(["--recipes", "--others", "nncf-int8"]) == 2
    said = capsys.readouterr().err
    assert "nncf-int8 of --others must be installed" in said
    assert len(said.splitlines()) == 1

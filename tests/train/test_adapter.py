"""Adapters: trained alone, merged into a plain bundle, and read by PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.ops.linear import FrozenLinear
from deepseek.train import LowRank, Run, Source, Stage, train
from deepseek.train.adapter import (
    TRAINED,
    frozen_bytes,
    insert_adapter,
    merge_adapter,
)
from deepseek.train.step import choose_parameters
from deepseek.train.summary import read_metrics
from tests.generate.conftest import TINY
from tests.tolerances import MODEL_LOGITS_ATOL, assert_close
from tests.train.conftest import MakeRun
from tests.train.test_resume import Killed, assert_same_bits, dying_at, weights

TOKENS = torch.arange(40).reshape(2, 20)


def adapted_run(make_run: MakeRun, **changes: object) -> Run:
    run = make_run()
    first, second = run.stages
    adapter = LowRank(rank=4, **changes)  # type: ignore[arg-type]
    return run.replace(
        stages=(
            first.replace(steps=3),
            second.replace(
                name="low-rank", trains=("*",), adapter=adapter, optimizer=first.optimizer
            ),
        )
    )


@pytest.mark.parametrize("base", ["float32", "int4"])
def test_new_adapters_change_nothing_but_the_base(base: str) -> None:
    torch.manual_seed(0)
    model = Decoder(TINY).eval()
    plain = model(TOKENS).logits.detach()
    insert_adapter(model, LowRank(base=base), seed=1)  # type: ignore[arg-type]
    found = model(TOKENS).logits.detach()
    if base == "float32":
        assert torch.equal(found, plain)
    assert any(isinstance(each, FrozenLinear) for each in model.modules()) == (base == "int4")
    merge_adapter(model)
    assert_close(model(TOKENS).logits, found)
    assert model.state_dict().keys() == Decoder(TINY).state_dict().keys()


@pytest.mark.parametrize("base", ["float32", "int4"])
def test_merged_is_as_it_was_beside(base: str) -> None:
    torch.manual_seed(0)
    model = Decoder(TINY).eval()
    insert_adapter(model, LowRank(base=base, targets=("q_proj", "down_proj")), seed=1)  # type: ignore[arg-type]
    parameters = choose_parameters(model, TRAINED)
    assert parameters and all("lora_" in name for name, _ in parameters)
    with torch.no_grad():
        for _, value in parameters:
            value.normal_(std=0.03)
    beside = model(TOKENS).logits.detach()
    merge_adapter(model)
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "Linear"
    torch.testing.assert_close(model(TOKENS).logits, beside, rtol=0, atol=MODEL_LOGITS_ATOL)


def test_only_the_adapters_move_and_the_bundle_is_plain(make_run: MakeRun, tmp_path: Path) -> None:
    folder = train(adapted_run(make_run), tmp_path)
    before, after = weights(folder.with_name("first")), weights(folder)
    for name, value in before.items():
        assert torch.equal(value, after[name]) != name.endswith(("q_proj.weight", "v_proj.weight"))
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[-1] < losses[3]


def test_peft_reads_the_adapters(make_run: MakeRun, tmp_path: Path) -> None:
    folder = train(adapted_run(make_run), tmp_path)
    base = hub.load(folder.with_name("first"), dtype="float32")
    joined = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters" / "low-rank"))  # type: ignore[arg-type]
    merged = hub.load(folder, dtype="float32")
    # merging rounds the sum of two weights, so the logits differ by more than the order of sums
    found, beside = merged(TOKENS).logits, joined(input_ids=TOKENS).logits
    torch.testing.assert_close(found, beside, rtol=0, atol=MODEL_LOGITS_ATOL)


@pytest.mark.parametrize("base", ["float32", "int4"])
@pytest.mark.parametrize("kill", [2, 4, 6])
def test_killed_anywhere_it_ends_the_same(
    make_run: MakeRun, tmp_path: Path, base: str, kill: int
) -> None:
    run = adapted_run(make_run, base=base, dropout=0.1)
    unbroken = train(run, tmp_path / "unbroken")
    with pytest.raises(Killed):
        train(run, tmp_path / "killed", report=dying_at(kill))
    assert_same_bits(train(run, tmp_path / "killed"), unbroken)


def test_four_bits_take_an_eighth() -> None:
    config = TINY.replace(hidden_size=64, intermediate_size=256)
    model = Decoder(config)
    model.requires_grad_(False)
    whole = frozen_bytes(model)
    layers = sum(each.nbytes for each in model.model.layers.parameters() if each.ndim == 2)
    insert_adapter(model, LowRank(base="int4"), seed=1)
    choose_parameters(model, TRAINED)
    assert frozen_bytes(model) == whole - layers + layers * 5 // 32


def test_mistakes_are_said(start_folder: Path, tmp_path: Path) -> None:
    for wrong in ({"rank": 0}, {"targets": ()}, {"dropout": 1.0}):
        with pytest.raises(ConfigError):
            LowRank(**wrong)  # type: ignore[arg-type]
    data = (Source(path="x"),)
    with pytest.raises(ConfigError, match="trains"):
        Stage(name="x", data=data, steps=1, adapter=LowRank(), trains=("model.*",))
    first = Stage(name="x", data=data, steps=1, adapter=LowRank())
    with pytest.raises(ConfigError, match="keeps_moments"):
        Run(model="x", stages=(first, Stage(name="y", data=data, steps=1, keeps_moments=True)))
    with pytest.raises(ConfigError, match="There are"):
        insert_adapter(Decoder(TINY), LowRank(targets=("query",)), seed=0)

"""Split tables and meshes as data: what they name, what they refuse, what they leave alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepseek.errors import ConfigError
from deepseek.models import DecoderConfig
from deepseek.models.divided import DividedDecoder
from deepseek.models.splits import check_mesh, decoder_splits
from deepseek.models.stage import DecoderStage, layers_of
from deepseek.parallel import AXES, MEANINGS, Grid, Mesh, Rule, World, split_model
from deepseek.parallel.splits import how_of
from tests.parallel.divided import FAMILIES, made, num_targets, samples, trained_whole
from tests.tolerances import assert_close

ALONE = Grid(Mesh(), World())
sizes = st.integers(1, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_with_parameters_is_named(family: str) -> None:
    model, table = made(FAMILIES[family]), decoder_splits(FAMILIES[family])
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            assert how_of(table, name) in MEANINGS, name


def test_the_first_rule_that_matches_holds() -> None:
    table = (Rule("a.*", "column"), Rule("*", "whole"))
    assert [how_of(table, name) for name in ("a.b", "a.b.c", "a")] == ["column", "column", "whole"]
    assert how_of(table[:1], "b") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_divides_nothing(family: str) -> None:
    model = made(FAMILIES[family])
    before = dict(model.named_parameters())
    axes = split_model(model, decoder_splits(FAMILIES[family]), ALONE)
    assert set(axes) == set(before)
    for name, value in model.named_parameters():
        assert value is before[name]
        assert ("expert" in axes[name]) != (".experts." in name)


def test_what_no_rule_names_is_refused() -> None:
    model = made(FAMILIES["qwen3"])
    layer = model.model.layers[0].self_attn
    layer.q_proj = nn.Sequential(layer.q_proj)  # as an adapter would
    with pytest.raises(ConfigError, match=r"q_proj\.0 of the split table"):
        split_model(model, decoder_splits(model.config), ALONE)


def test_a_rule_for_another_kind_of_module_is_refused() -> None:
    table = (Rule("model.norm", "column"), *decoder_splits(FAMILIES["qwen3"]))
    with pytest.raises(ConfigError, match="a linear layer to be split by 'column'; got 'RMSNorm'"):
        split_model(made(FAMILIES["qwen3"]), table, ALONE)


@given(
    data=st.none() | sizes, others=st.tuples(sizes, sizes, sizes, sizes), count=st.integers(1, 64)
)
def test_a_mesh_is_as_many_processes_as_there_are(
    data: int | None, others: tuple[int, ...], count: int
) -> None:
    shard, tensor, pipeline, expert = others
    mesh = Mesh(data=data, shard=shard, tensor=tensor, pipeline=pipeline, expert=expert)
    product = math.prod(others)
    if count % product == 0 and data in (None, count // product):
        sized = mesh.sized(count)
        assert math.prod(getattr(sized, axis) for axis in AXES) == count
        assert sized.is_divided == (product > 1)
    else:
        with pytest.raises(ConfigError, match=f"multiply to the {count} processes"):
            mesh.sized(count)


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_has_at_least_one_process(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"{axis} of Mesh must be at least 1"):
        Mesh(**{axis: 0})


@given(tensor=sizes, expert=sizes, pipeline=sizes, family=st.sampled_from(sorted(FAMILIES)))
def test_what_an_axis_does_not_divide_is_refused(
    tensor: int, expert: int, pipeline: int, family: str
) -> None:
    config, mesh = FAMILIES[family], Mesh(tensor=tensor, expert=expert, pipeline=pipeline)
    fits = config.num_heads % tensor == config.num_kv_heads % tensor == 0
    fits &= config.intermediate_size % tensor == 0 and pipeline <= config.num_layers
    if config.experts is None:
        fits &= expert == 1
    else:
        shared = config.experts.num_shared * config.experts.width
        fits &= config.experts.num_experts % (expert * tensor) == 0 == shared % tensor
    if fits:
        check_mesh(config, mesh)
    else:
        with pytest.raises(ConfigError, match="of the mesh must be"):
            check_mesh(config, mesh)


def test_the_refusal_says_what_would_do() -> None:
    smollm2: DecoderConfig = FAMILIES["qwen3"].replace(num_heads=9, num_kv_heads=3)
    with pytest.raises(ConfigError, match=r"num_heads \(9\); got 2\. 1, 3, 9 divide it\."):
        check_mesh(smollm2, Mesh(tensor=2))
    alibi = FAMILIES["llama-tied"].replace(positions="alibi")
    with pytest.raises(ConfigError, match="1 with ALiBi"):
        check_mesh(alibi, Mesh(tensor=2))


@given(num_layers=st.integers(1, 40), num_stages=st.integers(1, 8))
def test_each_layer_is_in_one_stage(num_layers: int, num_stages: int) -> None:
    num_stages = min(num_stages, num_layers)
    parts = [range(*layers_of(num_layers, stage, num_stages)) for stage in range(num_stages)]
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 <= min(map(len, parts))


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_in_a_row_are_the_whole(family: str) -> None:
    """One after another in one process, names and gradients as in the whole."""
    whole, (tokens, labels) = made(FAMILIES[family]), samples()
    first = DecoderStage(copy.deepcopy(whole), 0, 1)
    second = DecoderStage(copy.deepcopy(whole), 1)
    loss = second(first(tokens), labels) / num_targets(labels)
    loss.backward()
    expected = trained_whole(FAMILIES[family])
    assert_close(loss[0], torch.tensor(expected.losses[0]))
    for name, value in expected.gradients.items():
        parts = [
            parameter.grad
            for stage in (first, second)
            for own, parameter in stage.decoder.named_parameters()
            if own == name and parameter.grad is not None
        ]
        # embedding and head, where they are one weight, are in both
        assert len(parts) == (
            2 if name == "model.embed_tokens.weight" and whole.config.tie_embeddings else 1
        )
        assert_close(torch.stack(parts).sum(0), value)


def test_parts_run_one_by_one_are_the_batch() -> None:
    divided = DividedDecoder(made(FAMILIES["deepseek-v3"]), ALONE)
    tokens, labels = samples()
    loss = divided.backward(tokens, labels, 4, 1 / num_targets(labels))
    expected = trained_whole(FAMILIES["deepseek-v3"])
    assert_close(loss[0], torch.tensor(expected.losses[0]))
    for name, value in divided.named_parameters():
        assert value.grad is not None
        assert_close(value.grad, expected.gradients[name])

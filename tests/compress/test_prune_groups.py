"""Groups of channels, found by tracing: ours and a stranger's modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.compress.prune import Group, find_groups
from deepseek.compress.prune.cut import anatomy
from tests.compress.prune import BERT, IDS, LLAMA, made
from tests.models.zoo import ours, reference


def sizes(group: Group) -> dict[str, int]:
    """Return places of a unit by dimension, of layer 0 and outside layers."""
    return {f"{name}:{dim}": each.shape[1] for (name, dim), each in group.places.items()}


def of_part(model: nn.Module, part: str) -> list[dict[str, int]]:
    return [sizes(group) for group in anatomy(model).of(part)]  # type: ignore[arg-type]


def test_a_decoder_with_grouped_heads() -> None:
    model = made(LLAMA)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    heads = of_part(model, "heads")
    assert len(heads) == 3
    assert heads[1] == {
        f"{attention}.q_proj.weight:0": 16,
        f"{attention}.k_proj.weight:0": 8,
        f"{attention}.v_proj.weight:0": 8,
        f"{attention}.o_proj.weight:1": 16,
    }
    assert of_part(model, "channels")[1] == {
        f"{mlp}.gate_proj.weight:0": 1,
        f"{mlp}.up_proj.weight:0": 1,
        f"{mlp}.down_proj.weight:1": 1,
    }
    (width,) = anatomy(model).of("width")
    assert width.num_units == 32
    # embedding and final norm; four matrices of attention, three of the feed-forward, two norms
    assert len(width.places) == 2 + 3 * 9


def test_units_of_a_group_follow_the_order_of_heads() -> None:
    group = anatomy(made(LLAMA)).of("heads")[0]
    queries = group.places["model.layers.0.self_attn.q_proj.weight", 0]
    assert torch.equal(queries, torch.arange(48).view(3, 16))


@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa"])
def test_every_execution_of_attention_has_the_same_groups(impl: str) -> None:
    model = made(LLAMA)
    expected = [sizes(group) for group in find_groups(model, lambda: model(IDS).logits)]
    model.impl = impl  # type: ignore[assignment]
    found = [sizes(group) for group in find_groups(model, lambda: model(IDS).logits)]
    assert found == expected


def test_a_mixture_of_experts() -> None:
    model = ours(reference("qwen3-moe-mixed"))
    mlp = "model.layers.0.mlp"
    experts = of_part(model, "experts")
    assert len(experts) == 2  # layer 1 is dense
    assert experts[0] == {
        f"{mlp}.gate.weight:0": 1,
        f"{mlp}.experts.gate_up_proj:0": 1,
        f"{mlp}.experts.down_proj:0": 1,
    }
    inner = anatomy(model).of("expert_channels")[0]
    assert sizes(inner) == {f"{mlp}.experts.gate_up_proj:1": 2, f"{mlp}.experts.down_proj:2": 1}
    pairs = inner.places[f"{mlp}.experts.gate_up_proj", 1]
    assert torch.equal(pairs, torch.stack((torch.arange(32), torch.arange(32) + 32), 1))
    assert len(of_part(model, "channels")) == 1


def test_latent_attention_and_experts_in_groups() -> None:
    model = ours(reference("deepseek-v3"))
    attention = "model.layers.0.self_attn"
    assert of_part(model, "heads")[0] == {
        f"{attention}.q_b_proj.weight:0": 20,
        f"{attention}.kv_b_proj.weight:0": 22,
        f"{attention}.o_proj.weight:1": 10,
    }
    groups = of_part(model, "experts")[0]
    assert groups["model.layers.1.mlp.gate.e_score_correction_bias:0"] == 2
    assert set(groups.values()) == {2}  # experts of a group go together


def test_an_encoder() -> None:
    model = made(BERT)
    layer = "encoder.layer.0"
    assert of_part(model, "heads")[0] == {
        **{
            f"{layer}.attention.self.{part}.{kind}:0": 12
            for part in ("query", "key", "value")
            for kind in ("weight", "bias")
        },
        f"{layer}.attention.output.dense.weight:1": 12,
    }
    (width,) = anatomy(model).of("width")
    assert width.reaches_output
    assert ("embeddings.position_embeddings.weight", 1) in width.places
    assert ("pooler.dense.weight", 1) in width.places
    assert len(of_part(model, "pooler")) == 1


def test_slopes_of_alibi_hold_the_heads() -> None:
    model = made(LLAMA.replace(positions="alibi"))
    assert of_part(model, "heads") == []
    assert len(of_part(model, "channels")) == 3


class Strange(nn.Module):
    """Two branches that are split, reordered, joined and added, in no family's way."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 12)
        self.two = nn.Linear(5, 6)
        self.three = nn.Linear(18, 6, bias=False)
        self.scale = nn.Parameter(torch.ones(6))
        self.four = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        left, right = self.one(inputs).chunk(2, dim=-1)
        mixed = F.silu(left) * right.roll(1, -1)
        side = self.two(inputs)
        both = torch.cat((mixed, side, side * self.scale), -1)
        return self.four(self.three(both).sigmoid())


def units(group: Group, name: str, dim: int) -> list[list[int]]:
    return group.places[name, dim].tolist()


def test_a_stranger_with_chunks_rolls_and_concatenation() -> None:
    model = Strange()
    groups = find_groups(model, lambda: model(torch.randn(3, 5)))
    found = {frozenset(sizes(group)): group for group in groups}
    mixed = next(group for group in groups if ("one.weight", 0) in group.places)
    # left channel i meets right channel i - 1, and both are place i of what is joined
    assert units(mixed, "one.weight", 0)[:2] == [[0, 11], [1, 6]]
    assert units(mixed, "three.weight", 1)[:2] == [[0], [1]]
    side = next(group for group in groups if ("two.weight", 0) in group.places)
    assert units(side, "three.weight", 1)[0] == [6, 12]
    assert sizes(side) == {"two.weight:0": 1, "two.bias:0": 1, "scale:0": 1, "three.weight:1": 2}
    assert frozenset(("three.weight:0", "four.weight:1")) in found
    last = next(group for group in groups if ("four.weight", 0) in group.places)
    assert last.reaches_output and not mixed.reaches_output
    # what comes from outside has its size
    assert not any(("one.weight", 1) in group.places for group in groups)
    assert mixed.read == {("three.weight", 1)}


class Unknown(nn.Module):
    """Does something that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 6)
        self.two = nn.Linear(6, 4)
        self.three = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.one(inputs)
        return self.two(states.cumsum(-1)) + self.three(states)


def test_what_an_unknown_operation_touches_stays() -> None:
    model = Unknown()
    groups = find_groups(model, lambda: model(torch.randn(3, 5)))
    assert [set(group.places) for group in groups] == [
        {("two.weight", 0), ("two.bias", 0), ("three.weight", 0), ("three.bias", 0)}
    ]


class Named(nn.Module):
    """Reads one channel by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 6)
        self.two = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.one(inputs)
        return self.two(states) * states[:, 2:3].sigmoid() * states[:, 4, None]


def test_a_channel_that_is_read_by_its_number_stays() -> None:
    model = Named()
    groups = find_groups(model, lambda: model(torch.randn(3, 5)))
    group = next(group for group in groups if ("one.weight", 0) in group.places)
    assert units(group, "one.weight", 0) == [[0], [1], [3], [5]]


def test_tracing_leaves_the_model_alone() -> None:
    model = made(LLAMA)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    planner = model.planner
    anatomy(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.planner is planner

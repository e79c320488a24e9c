"""The flat step against the modules it is made from, and when it steps aside."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.generate import generate
from deepseek.generate.flat import flat_step, why_not_flat
from deepseek.models import Decoder, WindowPlanner
from deepseek.ops.attention import KVCache
from tests.models.test_planners import EveryBlock
from tests.models.zoo import CASES, ours, reference
from tests.tolerances import assert_logits_equal

FLAT = [case for case in CASES if "moe" not in case and "deepseek" not in case]


@pytest.mark.parametrize("case", FLAT)
@pytest.mark.parametrize("lengths", [[5], [70, 70], [3, 64, 90]])
def test_steps_equal_the_modules(case: str, lengths: list[int]) -> None:
    model = ours(reference(case))
    untouched = copy.deepcopy(model)
    batch, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), None
    mask = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        batch[row, :length], mask[row, :length] = torch.randint(0, 97, (length,)), 1
    with torch.inference_mode():
        caches = [each.new_cache(len(lengths), 130) for each in (model, untouched)]
        for each, cache in zip((model, untouched), caches, strict=True):
            each(batch, mask, cache=cache)
        step = flat_step(model, caches[0])
        assert step is not None
        for _ in range(12):
            tokens = torch.randint(0, 97, (len(lengths),))
            expected = untouched(tokens[:, None], cache=caches[1]).logits[:, 0]
            assert_logits_equal(step(tokens), expected)
    assert caches[0].lengths == caches[1].lengths
    for (name, mine), theirs in zip(
        model.state_dict().items(), untouched.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_weights_are_moved_once_and_stay_parameters() -> None:
    model = ours(reference("qwen2"))
    parameters = dict(model.named_parameters())
    cache = model.new_cache(1, 20)
    first = flat_step(model, cache)
    places = [parameter.data_ptr() for parameter in parameters.values()]
    second = flat_step(model, cache)
    assert first is not None and second is not None
    assert [parameter.data_ptr() for parameter in parameters.values()] == places
    assert all(a is b for a, b in zip(parameters.values(), model.parameters(), strict=True))
    tokens = torch.tensor([7])
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        expected = model(tokens[None], cache=model.new_cache(1, 20)).logits[0]
        assert_logits_equal(second(tokens), expected)
    loss = model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_after_generation_is_seen_by_generation() -> None:
    model = ours(reference("llama"))
    before = generate(model, [1, 2, 3], max_tokens=8).token_ids
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    after = generate(model, [1, 2, 3], max_tokens=8).token_ids
    moved = copy.deepcopy(model).to(torch.float64).to(torch.float32)
    assert generate(moved, [1, 2, 3], max_tokens=8).token_ids == after != before


def reasons() -> dict[str, tuple[Decoder, KVCache]]:
    from peft import LoraConfig, get_peft_model

    found: dict[str, tuple[Decoder, KVCache]] = {}
    for case in ("deepseek-v3", "qwen3-moe"):
        model = ours(reference(case))
        found[f"no flat step {case}"] = model, model.new_cache(1, 8)
    planned = ours(reference("llama"))
    planned.planner = EveryBlock()
    found["planner EveryBlock"] = planned, planned.new_cache(1, 8)
    named = ours(reference("llama"))
    named.impl = "reference"
    found["asked for by name"] = named, named.new_cache(1, 8)
    hooked = ours(reference("llama"))
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    found["layers.1.mlp has forward hooks"] = hooked, hooked.new_cache(1, 8)
    wrapped = ours(reference("llama"))
    get_peft_model(wrapped, LoraConfig(r=2, target_modules=["q_proj"]))
    found[""] = wrapped, wrapped.new_cache(1, 8)
    paged = ours(reference("llama"))
    cache = paged.new_cache(1, 8)
    import dataclasses

    cache.layers = [dataclasses.replace(layer, first_page=None) for layer in cache.layers]
    found["do not follow one another"] = paged, cache
    return found


def test_it_steps_aside_and_says_why() -> None:
    for said, (model, cache) in reasons().items():
        reason = why_not_flat(model, cache)
        assert reason is not None and said.split(" deepseek")[0].split(" qwen")[0] in reason
        assert flat_step(model, cache) is None
    window = ours(reference("mistral-window"))
    assert isinstance(window.planner, WindowPlanner)
    assert why_not_flat(window, window.new_cache(1, 8)) is None


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"sampling": {"temperature": 1.0}}, "sampling of generate must be a Sampling"),
        ({"stop": None}, "stop of generate must be a list of strings"),
        ({"stop_token_ids": 2}, "stop_token_ids of generate must be a list"),
    ],
)
def test_arguments_of_another_kind_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        generate(ours(reference("llama")), [1, 2], max_tokens=2, **settings)

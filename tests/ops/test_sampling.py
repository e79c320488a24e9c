"""Sampling: the specification is what transformers does, and the fast path is the specification."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from deepseek.errors import BackendError, ConfigError
from deepseek.ops.sampling import Sampling, TokenHistory, choose, choose_greedy, reference

VOCABULARY = 1999
ROWS = 5
SETTINGS = {
    "temperature": Sampling(temperature=0.7),
    "hot": Sampling(temperature=1.9),
    "top-k": Sampling(temperature=1.0, top_k=40),
    "top-1": Sampling(temperature=1.0, top_k=1),
    "top-k beyond": Sampling(temperature=1.0, top_k=10**6),
    "top-p": Sampling(temperature=1.0, top_p=0.9),
    "small top-p": Sampling(temperature=0.5, top_p=0.01),
    "large top-p": Sampling(temperature=3.0, top_p=0.999),
    "min-p": Sampling(temperature=1.0, min_p=0.05),
    "min-p one": Sampling(temperature=1.0, min_p=1.0),
    "all": Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02),
}
PENALTIES = {
    "repetition": Sampling(repetition_penalty=1.3),
    "reward": Sampling(repetition_penalty=0.8),
    "frequency": Sampling(frequency_penalty=0.7),
    "presence": Sampling(presence_penalty=-0.4),
    "together": Sampling(
        temperature=0.9,
        top_k=30,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
    ),
}


def random_logits(seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, VOCABULARY, generator=generator) * scale


def generators(seed: int, rows: int = ROWS) -> list[random.Random]:
    return [random.Random(seed + row) for row in range(rows)]


def of_transformers(logits: Tensor, sampling: Sampling, ids: Tensor | None = None) -> Tensor:
    """Return the logits that `transformers.generate` would draw from."""
    process = pytest.importorskip("transformers.generation.logits_process")
    steps = []
    if sampling.repetition_penalty != 1:
        steps.append(process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        steps.append(process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(process.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        logits = step(ids, logits)
    return logits


@pytest.mark.parametrize("name", SETTINGS)
def test_filters_are_those_of_transformers(name: str) -> None:
    for seed in range(5):
        logits = random_logits(seed)
        expected = of_transformers(logits, SETTINGS[name])
        actual = reference.filter_logits(logits, SETTINGS[name])
        torch.testing.assert_close(actual.softmax(-1), expected.softmax(-1))
        assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    sampling = Sampling(repetition_penalty=penalty)
    prompts = torch.randint(VOCABULARY, (ROWS, 12))
    answer = torch.randint(VOCABULARY, (ROWS, 7))
    history = TokenHistory.of_prompts(prompts.tolist(), VOCABULARY)
    for tokens in answer.unbind(1):
        history.add(tokens)
    logits = random_logits(0)
    expected = of_transformers(logits, sampling, torch.cat((prompts, answer), dim=1))
    torch.testing.assert_close(reference.apply_penalties(logits, sampling, history), expected)


def test_frequency_and_presence_count_the_answer_only() -> None:
    history = TokenHistory.of_prompts([[1, 2]], 5)
    for token in (2, 3, 3):
        history.add(torch.tensor([token]))
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=2.0)
    actual = reference.apply_penalties(torch.zeros(1, 5), sampling, history)
    assert actual.tolist() == [[0.0, 0.0, -2.5, -3.0, 0.0]]


def test_history_of_chosen_rows() -> None:
    history = TokenHistory.of_prompts([[0], [1], [2]], 4)
    history.add(torch.tensor([3, 3, 2]))
    some = history.select([0, 2])
    assert some.seen.int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]
    assert some.counts.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize("name", [*SETTINGS, *PENALTIES])
@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
def test_fast_path_is_the_reference(name: str, scale: float) -> None:
    sampling = {**SETTINGS, **PENALTIES}[name]
    prompts = torch.randint(VOCABULARY, (ROWS, 200)).tolist()
    for seed in range(4):
        logits = random_logits(seed, scale)
        history = TokenHistory.of_prompts(prompts, VOCABULARY)
        history.add(logits.argmax(-1))
        expected = reference.choose(logits, sampling, generators(seed), history)
        assert choose(logits, sampling, generators(seed), history) == expected.tolist()


@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p", "min-p", "all"])
def test_equal_logits_are_treated_alike(name: str) -> None:
    logits = torch.randint(-3, 4, (ROWS, VOCABULARY)).float()
    for seed in range(5):
        expected = reference.choose(logits, SETTINGS[name], generators(seed)).tolist()
        assert choose(logits, SETTINGS[name], generators(seed)) == expected


@pytest.mark.parametrize("vocabulary", [1, 7, 64, 96, 512, 1999, 2048, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_the_largest(vocabulary: int, dtype: torch.dtype) -> None:
    logits = torch.randint(-40, 40, (ROWS, vocabulary)).to(dtype)
    first = [row.index(max(row)) for row in logits.tolist()]
    assert choose_greedy(logits) == first
    assert choose_greedy(logits[:1]) == first[:1]
    assert choose_greedy(logits.repeat_interleave(2, dim=0)[::2]) == first


@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0])
def test_top_p_of_a_large_vocabulary(scale: float) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.8)
    logits = torch.randn(2, 20000) * scale
    for seed in range(3):
        expected = reference.choose(logits, sampling, generators(seed, 2)).tolist()
        assert choose(logits, sampling, generators(seed, 2)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    logits = random_logits(0).to(dtype)
    for sampling in (Sampling(), SETTINGS["all"]):
        expected = reference.choose(logits, sampling, generators(0)).tolist()
        assert choose(logits, sampling, generators(0)) == expected


def test_a_row_does_not_depend_on_its_companions() -> None:
    logits, sampling = random_logits(0), SETTINGS["all"]
    together = choose(logits, sampling, generators(3))
    alone = [
        choose(logits[row : row + 1], sampling, generators(3 + row, 1))[0] for row in range(ROWS)
    ]
    assert together == alone


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    draws = 4000
    logits = probabilities.log().expand(draws, 4)
    uniforms = torch.rand(draws, dtype=torch.double).tolist()
    share = torch.bincount(reference.draw(logits, uniforms), minlength=4) / draws
    assert share[1] == 0
    assert (share - probabilities).abs().max() < 4 * math.sqrt(0.25 / draws)


@pytest.mark.parametrize("uniform", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_a_removed_token_is_never_drawn(uniform: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    assert reference.draw(logits, [uniform]).item() in (1, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), SETTINGS["all"]])
@pytest.mark.parametrize("rows", [1, 3])
def test_damaged_logits_are_a_clear_error(value: float, sampling: Sampling, rows: int) -> None:
    logits = torch.zeros(rows, 9)
    logits[-1, 4] = value
    with pytest.raises(BackendError, match=f"largest logit of row {rows - 1} of sampling"):
        choose(logits, sampling, generators(0, rows))


def test_logits_without_any_token_are_a_clear_error() -> None:
    with pytest.raises(BackendError, match="must be finite; got -inf"):
        choose_greedy(torch.full((1, 4), -math.inf))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-9),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("seed", 2**63),
        ("seed", 0.5),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field} of Sampling must be "):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_config_survives_its_dictionary() -> None:
    sampling = Sampling(temperature=1, top_k=5, seed=-3)
    assert Sampling.from_dict(sampling.to_dict()) == sampling

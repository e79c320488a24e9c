"""What a row gets does not depend on its companions, on chunks, or on who implements the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data import Tokenizer
from deepseek.generate import Completion, Sampling, chat_prompt, generate, prefill
from deepseek.models import Decoder, DecoderConfig, LatentConfig
from deepseek.models.families import build_model, config_from_hf, state_from_hf
from tests.generate.conftest import TINY, ScriptedModel
from tests.tolerances import assert_logits_equal

LENGTHS = [5, 1, 33, 17, 64, 2, 90, 5]
LATENT = LatentConfig(query_rank=16, kv_rank=12, nope_dim=8, rope_dim=4, value_dim=8)
CONFIGS = {
    "grouped": TINY,
    "window": TINY.replace(window=7, window_layers=(0,)),
    "latent": TINY.replace(family="deepseek_v3", num_kv_heads=4, latent=LATENT),
    "alibi": TINY.replace(positions="alibi"),
}


def tiny(config: DecoderConfig) -> Decoder:
    torch.manual_seed(2)
    return Decoder(config).eval()


def random_prompts(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(TINY.vocab_size, (length,)).tolist() for length in lengths]


def tokens_of(result: Completion | list[Completion]) -> list[tuple[int, ...]]:
    results = result if isinstance(result, list) else [result]
    return [one.token_ids for one in results]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("budget", [32, 512])
def test_a_batch_gives_what_rows_give_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, budget: int
) -> None:
    monkeypatch.setattr(prefill, "MAX_PASS_TOKENS", budget)
    model, prompts = tiny(CONFIGS[name]), random_prompts(LENGTHS)
    together = tokens_of(generate(model, prompts, max_tokens=12))
    monkeypatch.setattr(prefill, "MAX_PASS_TOKENS", 10**6)
    alone = [tokens_of(generate(model, prompt, max_tokens=12))[0] for prompt in prompts]
    assert together == alone
    assert len({token for row in alone for token in row}) > 10


def test_rows_that_leave_do_not_disturb_the_others() -> None:
    model, prompts = tiny(TINY), random_prompts(LENGTHS)
    # a token that some rows meet early ends them at different steps
    free = tokens_of(generate(model, prompts, max_tokens=12))
    ends = [free[0][3], free[3][1], free[6][6]]
    together = tokens_of(generate(model, prompts, max_tokens=12, stop_token_ids=ends))
    assert len({len(row) for row in together}) > 2
    for row, whole in zip(together, free, strict=True):
        assert row == whole[: len(row)]
        assert len(row) == 12 or row[-1] in ends


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=-5),
        Sampling(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.2),
        Sampling(temperature=1.3, repetition_penalty=1.2, seed=8),
    ],
)
def test_row_i_is_the_row_alone_with_seed_plus_i(sampling: Sampling) -> None:
    model, prompts = tiny(TINY), random_prompts(LENGTHS)
    together = tokens_of(generate(model, prompts, max_tokens=10, sampling=sampling))
    assert together == tokens_of(generate(model, prompts, max_tokens=10, sampling=sampling))
    for row, prompt in enumerate(prompts):
        seed = None if sampling.seed is None else sampling.seed + row
        own = sampling.replace(seed=seed)
        alone = generate(model, prompt, max_tokens=10, sampling=own)
        assert tokens_of(alone) == [together[row]]


def test_equal_prompts_differ_by_their_seeds() -> None:
    sampling = Sampling(temperature=1.5, seed=1)
    rows = tokens_of(generate(tiny(TINY), [[1, 2, 3]] * 4, max_tokens=8, sampling=sampling))
    assert len(set(rows)) == 4


def test_without_a_seed_each_call_draws_anew() -> None:
    model, sampling = tiny(TINY), Sampling(temperature=2.0)
    calls = [tokens_of(generate(model, [1], max_tokens=16, sampling=sampling))[0] for _ in range(2)]
    assert calls[0] != calls[1]


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=40))
def test_groups_cover_the_rows_within_the_budget(lengths: list[int]) -> None:
    lengths = sorted(lengths)
    groups = prefill.group_rows(lengths)
    assert [row for start, stop in groups for row in range(start, stop)] == list(
        range(len(lengths))
    )
    for start, stop in groups:
        padded = (stop - start) * lengths[stop - 1]
        if stop - start > 1:
            assert padded <= prefill.MAX_PASS_TOKENS
            assert padded <= 2 * sum(lengths[start:stop])


def test_passes_stay_within_the_budget() -> None:
    model = ScriptedModel([7] * 5000, None, context=4000)
    generate(model, [[0] * length for length in (3, 1700, 3, 200, 250)], max_tokens=1)
    assert model.passes == [(2, 3), (2, 250), (1, 512), (1, 512), (1, 512), (1, 164)]


def test_chunks_give_the_logits_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompt,) = tiny(TINY), random_prompts([201])
    whole = model(torch.tensor([prompt])).logits[:, -1]
    monkeypatch.setattr(prefill, "MAX_PASS_TOKENS", 64)
    chunked = prefill.prefill(model, [prompt], model.new_cache(1, 256))
    assert_logits_equal(chunked, whole)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_tokens_are_those_of_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = build_model(config_from_hf(config.to_dict()))
    assert isinstance(ours, Decoder)
    ours.load_state_dict(state_from_hf(ours.config, theirs.state_dict()), strict=True)
    prompts = random_prompts([3, 40, 90])
    sampling = Sampling(repetition_penalty=penalty)
    actual = tokens_of(generate(ours.eval(), prompts, max_tokens=30, sampling=sampling))
    for prompt, tokens in zip(prompts, actual, strict=True):
        ids = torch.tensor([prompt])
        output = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        assert output[0, len(prompt) :].tolist() == list(tokens)


@pytest.mark.slow
def test_smollm2_continues_as_in_transformers(smollm2_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from deepseek.hub import load

    model = load(smollm2_folder, dtype="float32")
    assert isinstance(model, Decoder) and isinstance(model.tokenizer, Tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "Name three rivers of Europe. 用中文回答。"}]
    prompts = [
        model.tokenizer.encode("The capital of France is"),
        model.tokenizer.encode("def fibonacci(n):\n    "),
        chat_prompt(model.tokenizer, chat),
    ]
    results = generate(model, prompts, max_tokens=64)
    assert isinstance(results, list)
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt])
        output = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        expected = output[0, len(prompt) :].tolist()
        assert list(result.token_ids) == expected
        assert result.text == model.tokenizer.decode(expected)

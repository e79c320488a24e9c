"""Models without an engine are served through their modules, and say what `generate` says."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

import deepseek
from deepseek.errors import ConfigError
from deepseek.generate import generate
from deepseek.generate.modules import why_no_engine
from deepseek.models import Decoder
from deepseek.models.config import DecoderConfig, LatentConfig
from deepseek.ops.sampling import Sampling
from deepseek.serve import local_server
from deepseek.serve.assembly import build_service
from deepseek.serve.automatic import Asked
from deepseek.serve.generation import GenerationRequest
from deepseek.serve.runtime.module_engine import ModuleEngine
from deepseek.serve.service import Service
from tests.generate.conftest import TINY, byte_tokenizer
from tests.ops.native import NEEDS_KERNELS
from tests.serve.bundles import TEMPLATE

pytestmark = NEEDS_KERNELS

LATENT = LatentConfig(query_rank=None, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8)
CONFIGS = {
    "alibi": TINY.replace(positions="alibi", family="deepseek_stack"),
    "latent": TINY.replace(latent=LATENT, num_kv_heads=4, family="deepseek_stack"),
}
TEXTS = ["What is", "once upon a time " * 9, "a" * 70, "once upon a time " * 9 + "there"]


def model_of(config: DecoderConfig) -> Decoder:
    torch.manual_seed(1)
    model = Decoder(config).eval()
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>", chat_template=TEMPLATE)
    assert why_no_engine(model) is not None
    return model


MODELS = {name: model_of(config) for name, config in CONFIGS.items()}


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.integers(1, 150), min_size=1, max_size=3),
    st.integers(0, 2**16),
)
def test_steps_over_scattered_pages_give_the_logits_of_one_pass(
    name: str, lengths: list[int], seed: int
) -> None:
    model, rng = MODELS[name], np.random.default_rng(seed)
    texts = [rng.integers(0, 256, length) for length in lengths]
    engine = ModuleEngine(model)
    pages = engine.new_pages(12)
    for layer in pages.layers:  # what nobody has written must not be read
        layer.key_pages.fill_(torch.nan)
        layer.value_pages.fill_(torch.nan)
    table = rng.permutation(12)[: 3 * len(texts)].reshape(len(texts), 3).astype(np.int32)
    found = [np.empty((0, TINY.vocab_size), np.float32) for _ in texts]
    while any(len(own) < length for own, length in zip(found, lengths, strict=True)):
        left = [length - len(own) for own, length in zip(found, lengths, strict=True)]
        counts = [int(rng.integers(0, most, endpoint=True)) for most in left]
        places = [np.arange(len(own), len(own) + n) for own, n in zip(found, counts, strict=True)]
        if not sum(counts):
            continue
        tokens = np.concatenate([text[at] for text, at in zip(texts, places, strict=True)])
        rows = np.repeat(np.arange(len(texts)), counts)
        got = engine.step(
            pages, tokens, np.concatenate(places), rows, table, np.arange(len(tokens))
        )
        found = [np.concatenate([own, got[rows == row]]) for row, own in enumerate(found)]
    for text, own in zip(texts, found, strict=True):
        with torch.inference_mode():
            whole = model(torch.from_numpy(text)[None]).logits[0].numpy()
        np.testing.assert_allclose(own, whole, atol=2e-4)


def test_only_the_logits_that_are_wanted_come_in_their_order() -> None:
    engine = ModuleEngine(MODELS["alibi"])
    pages, table = engine.new_pages(4), np.array([[2], [0]], np.int32)
    tokens, places, rows = [1, 2, 3, 4, 5], [0, 1, 2, 0, 1], [0, 0, 0, 1, 1]
    every = engine.step(pages, tokens, places, rows, table, range(5))
    some = engine.step(pages, tokens, places, rows, table, [4, 1])
    np.testing.assert_allclose(some, every[[4, 1]], atol=1e-5)
    assert engine.step(pages, tokens, places, rows, table, []).shape == (0, TINY.vocab_size)


def answers(service: Service, wanted: list[GenerationRequest]) -> list[list[int]]:
    async def one(request: GenerationRequest) -> list[int]:
        outputs = [output async for output in service.generate(request)]
        return [choice.token_id for output in outputs for choice in output.tokens]

    async def body() -> list[list[int]]:
        await service.start()
        try:
            found = [await asyncio.gather(*map(one, wanted)) for _ in range(2)]
            assert found[0] == found[1], "prompts that are in the cache are answered otherwise"
            return list(found[0])
        finally:
            await service.stop(drains=False)

    return asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.parametrize("pages", [64, 9])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_answers_are_those_of_generate(name: str, pages: int) -> None:
    """Greedy and drawn, together, in chunks, guessed ahead, and with so few pages that requests are
    turned back. The tiny models' ties are far away."""
    model = MODELS[name]
    assert model.tokenizer is not None
    asked = Asked(pages=pages, max_running=8, step_tokens=64)
    service, _ = build_service(ModuleEngine(model), asked, model=name)
    wanted = [
        GenerationRequest(
            prompt=tuple(model.tokenizer.encode(text)),
            max_tokens=16,
            sampling=Sampling(temperature=temperature, seed=3),
            ignore_eos=True,
        )
        for text in TEXTS
        for temperature in (0.0, 0.9)
    ]
    for request, found in zip(wanted, answers(service, wanted), strict=True):
        alone = generate(
            model, list(request.prompt), max_tokens=16, sampling=request.sampling, ignore_eos=True
        )
        assert not isinstance(alone, list)
        assert found == list(alone.token_ids)


def test_adapters_are_refused() -> None:
    engine = ModuleEngine(MODELS["alibi"])
    with pytest.raises(ConfigError, match="Merge the adapter"):
        engine.add_adapter("one", {})
    with pytest.raises(ConfigError, match="one that is loaded"):
        engine.drop_adapter("one")


@pytest.mark.slow
def test_deepseek_serve_says_that_it_is_slow_and_why(tmp_path: Path) -> None:
    folder = tmp_path / "alibi"
    deepseek.save(MODELS["alibi"], folder)
    words = [sys.executable, "-m", "deepseek", "serve", str(folder), "--explain", "--pages", "64"]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True)
    assert "ALiBi" in done.stderr
    first = json.loads(done.stdout)["values"][0]
    assert first["value"] == "modules" and "ALiBi" in first["why"]
    done = subprocess.run([*words, "--scheme", "int8"], capture_output=True, text=True)
    assert done.returncode == 2 and "ALiBi" in done.stderr
    with local_server(folder, ["--name", "alibi", "--pages", "64"]) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        found = client.completions.create(
            model="alibi", prompt="What is", max_tokens=20, temperature=0
        )
    alone = generate(MODELS["alibi"], "What is", max_tokens=20)
    assert not isinstance(alone, list)
    assert found.choices[0].text == alone.text

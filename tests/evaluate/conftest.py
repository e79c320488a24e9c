"""Tiny models and a tokenizer of bytes, so that most tests need no download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

TRANSFORMERS = pytest.importorskip("transformers")


class ByteTokenizer:
    """One token a byte, and one that begins and ends a text."""

    bos_token_id = 256
    eos_token_id = 256

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return bytes as text."""
        kept = bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")
        return kept if skip_special_tokens else kept + "<eos>" * list(ids).count(256)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run small work on one thread: with several workers, more would wait for each other."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    """Return the tokenizer of bytes."""
    return ByteTokenizer()


@pytest.fixture
def tiny() -> torch.nn.Module:
    """Return a random Llama of transformers over bytes."""
    return tiny_llama(seed=0)


@pytest.fixture
def other() -> torch.nn.Module:
    """Return another random Llama over the same vocabulary."""
    return tiny_llama(seed=1)


def tiny_llama(seed: int) -> torch.nn.Module:
    """Return a random Llama whose logits are far from flat."""
    torch.manual_seed(seed)
    config = TRANSFORMERS.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=256,
    )
    return TRANSFORMERS.LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> torch.nn.Module:
    """Return SmolLM2-135M-Instruct as transformers loads it, in fp32."""
    return TRANSFORMERS.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> object:
    """Return the tokenizer of SmolLM2 as transformers loads it."""
    return TRANSFORMERS.AutoTokenizer.from_pretrained(smollm2_folder)

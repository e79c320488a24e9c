"""Small models for the token loop: one that follows a script, and tiny real decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from deepseek.data import Tokenizer
from deepseek.models import CausalOutput, Decoder, DecoderConfig
from deepseek.ops.attention import KVCache, KVShape


def byte_tokenizer(**settings: str) -> Tokenizer:
    """Return a tokenizer with one id a byte and the special tokens `<begin>` and `<end>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=True) for token in ("<begin>", "<end>")])
    return Tokenizer(backend, **settings)


@dataclasses.dataclass
class ScriptedConfig:
    """The part of a decoder's config that generation reads."""

    max_positions: int
    vocab_size: int = 258
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None


class ScriptedModel:
    """A model whose token at place p of a row is `script[p]`, whatever came before."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, script: list[int], tokenizer: Tokenizer | None, context: int = 1000) -> None:
        self.config = ScriptedConfig(context)
        self.tokenizer = tokenizer
        self.script = script
        self.passes: list[tuple[int, int]] = []

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        return KVCache.contiguous([KVShape(1, 1, 1)], batch_size, max_tokens, dtype=self.dtype)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache,
        last_only: bool,
    ) -> CausalOutput:
        assert last_only
        rows, length = input_ids.shape
        self.passes.append((rows, length))
        counts = [length] * rows if attention_mask is None else attention_mask.sum(1).tolist()
        cache.advance(cache.place(length, counts))
        logits = torch.zeros(rows, 1, self.config.vocab_size)
        for row, place in enumerate(cache.lengths):
            logits[row, 0, self.script[place]] = 1.0
        return CausalOutput(None, logits, None)


ScriptedText = Callable[..., ScriptedModel]


@pytest.fixture
def says() -> ScriptedText:
    """Return a maker of models that say a text after a prompt of one token, then `<end>`."""

    def make(text: str, *, ends: bool = True, context: int = 1000) -> ScriptedModel:
        tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
        end = tokenizer.encode("<end>" if ends else ".") * 1000
        return ScriptedModel([0, *tokenizer.encode(text), *end], tokenizer, context)

    return make


TINY = DecoderConfig(
    vocab_size=258,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=512,
    # a larger spread than a trained model's: its greedy tokens vary, and ties are far away
    init_std=0.4,
)


@pytest.fixture
def tiny_model() -> Decoder:
    """Return a small decoder with random weights and a byte tokenizer."""
    torch.manual_seed(1)
    model = Decoder(TINY).eval()
    model.tokenizer = byte_tokenizer(bos_token="<begin>")
    return model

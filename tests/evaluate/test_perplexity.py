"""Perplexity equals a plain loop, uses bounded memory, and carries its interval."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, ShapeError
from deepseek.evaluate import Corpus, default_corpus, perplexity
from deepseek.evaluate.base import ROWS_PER_SLICE
from deepseek.evaluate.sliding_perplexity import token_losses

TEXT = default_corpus().text[1000:1900]


def documented_loop(model: nn.Module, ids: Tensor, window: int, stride: int) -> float:
    """Return the perplexity by the loop in the documentation of transformers, to the letter."""
    length, previous_end, total, count = ids.shape[1], 0, 0.0, 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        num_targets = end - previous_end
        rows = ids[:, begin:end]
        targets = rows.clone()
        targets[:, :-num_targets] = -100
        with torch.no_grad():
            loss = model(rows, labels=targets).loss
        num_valid = int((targets != -100).sum()) - 1
        total += float(loss) * num_valid
        count += num_valid
        previous_end = end
        if end == length:
            break
    return math.exp(total / count)


def plain_losses(model: nn.Module, ids: list[int], window: int, stride: int) -> list[float]:
    """Return the loss of every token but the first, computed one token at a time."""
    losses = []
    for place in range(1, len(ids)):
        begin = 0 if place < window else stride * -(-(place + 1 - window) // stride)
        logits = model(torch.tensor([ids[begin:place]])).logits[0, -1]
        losses.append(-float(logits.double().log_softmax(0)[ids[place]].detach()))
    return losses


def test_losses_equal_one_token_at_a_time(tiny: nn.Module) -> None:
    ids = list(TEXT.encode()[:40])
    found = token_losses(tiny, ids, window=12, stride=5)
    assert found.tolist() == pytest.approx(plain_losses(tiny, ids, 12, 5), abs=2e-5)


def test_value_equals_the_documented_loop(tiny: nn.Module, tokenizer: object) -> None:
    expected = documented_loop(tiny, torch.tensor([list(TEXT.encode())]), 128, 48)
    found = perplexity(tiny, TEXT, tokenizer=tokenizer, window=128, stride=48)
    ours = math.exp(float(torch.cat(found.losses).mean()))
    assert found.measurements[0].value == pytest.approx(ours, rel=1e-12)
    # The loop there weights a window by one token too few, which random logits make visible.
    assert found.measurements[0].value == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_batches_do_not_change_the_losses(tiny: nn.Module, batch_size: int | None) -> None:
    ids = list(TEXT.encode()[:301])
    alone = token_losses(tiny, ids, 64, 32, batch_size=1)
    assert torch.allclose(
        token_losses(tiny, ids, 64, 32, batch_size=batch_size), alone, rtol=0, atol=1e-5
    )


def test_a_flat_model_has_the_perplexity_of_its_vocabulary(tokenizer: object) -> None:
    def flat(input_ids: Tensor) -> Tensor:
        return torch.zeros(*input_ids.shape, 256)

    found = perplexity(flat, TEXT, tokenizer=tokenizer, window=100).measurements
    assert [each.name for each in found] == ["perplexity", "bits_per_byte"]
    assert found[0].value == pytest.approx(256)
    assert found[1].value == pytest.approx(8)
    assert found[0].spread is not None
    assert (found[0].spread.low, found[0].spread.high) == pytest.approx((256, 256))


def test_the_head_sees_one_slice_at_a_time(tiny: nn.Module) -> None:
    rows: list[int] = []
    tiny.lm_head.register_forward_hook(lambda _, __, out: rows.append(out[..., 0].numel()))
    token_losses(tiny, list(TEXT.encode()[:512]), window=512, stride=256)
    assert max(rows) <= ROWS_PER_SLICE
    assert sum(rows) <= 511 + 2


class Capped(nn.Module):
    """A model that bends its logits after the head, as Gemma does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, whose product alone is not the logits here."""
        return self.inner.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return capped logits."""
        return 2 * torch.tanh(self.inner(input_ids).logits / 2)


def test_what_comes_after_the_head_is_not_lost(tiny: nn.Module) -> None:
    ids = list(TEXT.encode()[:300])
    capped = Capped(tiny)
    through_head = token_losses(capped, ids, 128, 64)
    whole = token_losses(lambda input_ids: capped(input_ids), ids, 128, 64)
    assert torch.allclose(through_head, whole, atol=1e-5)
    assert not torch.allclose(through_head, token_losses(tiny, ids, 128, 64), atol=0.1)


def test_mode_and_hooks_are_put_back(tiny: nn.Module) -> None:
    tiny.train()
    token_losses(tiny, [1, 2, 3, 4], 4, 2)
    assert tiny.training
    assert not tiny.lm_head._forward_pre_hooks


def test_documents_are_scored_apart_and_resampled(tiny: nn.Module, tokenizer: object) -> None:
    documents = [TEXT[:200], TEXT[200:300], TEXT[300:700]]
    found = perplexity(tiny, documents, tokenizer=tokenizer, window=64)
    alone = [perplexity(tiny, each, tokenizer=tokenizer, window=64).losses[0] for each in documents]
    assert all(torch.equal(a, b) for a, b in zip(found.losses, alone, strict=True))
    assert "3 documents" in str(found.measurements[0].conditions["interval"])
    assert found.measurements[0].command == ""


def test_max_tokens_cuts_text_and_bytes(tiny: nn.Module, tokenizer: object) -> None:
    cut = perplexity(tiny, TEXT, tokenizer=tokenizer, window=64, max_tokens=120)
    short = perplexity(tiny, TEXT[:120], tokenizer=tokenizer, window=64)
    assert torch.equal(cut.losses[0], short.losses[0])
    assert cut.measurements[1].value == short.measurements[1].value


def test_a_measurement_says_how_to_repeat_it(tiny: nn.Module, tokenizer: object) -> None:
    found = perplexity(tiny, tokenizer=tokenizer, window=64, max_tokens=200, seed=3).measurements[0]
    assert found.command == (
        "deepseek eval MODEL --tasks perplexity --window 64 --stride 32 --max-tokens 200 --seed 3"
    )
    for name in ("dtype", "threads", "window", "stride", "tokens", "text_sha256", "interval"):
        assert name in found.conditions
    again = perplexity(tiny, tokenizer=tokenizer, window=64, max_tokens=200, seed=3)
    assert again.measurements[0] == found


def test_progress_ends_at_one(tiny: nn.Module, tokenizer: object) -> None:
    seen: list[float | None] = []
    perplexity(
        tiny,
        [TEXT[:150], TEXT[:90]],
        tokenizer=tokenizer,
        window=32,
        progress=lambda _, share: seen.append(share),
    )
    assert seen == sorted(seen, key=lambda share: share or 0.0)
    assert seen[-1] == pytest.approx(1)


def test_mistakes_are_explained(tiny: nn.Module, tokenizer: object) -> None:
    with pytest.raises(ConfigError, match="tokenizer of perplexity"):
        perplexity(tiny, TEXT)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        perplexity(tiny, "a", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="at most 512"):
        perplexity(tiny, TEXT, tokenizer=tokenizer, window=1024)
    with pytest.raises(ShapeError, match="logits"):
        perplexity(lambda ids: torch.zeros(3, 4), TEXT, tokenizer=tokenizer, window=32)


def check_against_documented_loop(
    model: nn.Module, tokenizer: object, num_tokens: int, window: int, stride: int
) -> None:
    """Check four digits against the loop in the documentation of transformers."""
    corpus: Corpus = default_corpus()
    ids = torch.tensor([tokenizer.encode(corpus.text)[:num_tokens]])
    expected = documented_loop(model, ids, window, stride)
    found = perplexity(
        model, tokenizer=tokenizer, window=window, stride=stride, max_tokens=num_tokens
    )
    assert f"{found.measurements[0].value:.4g}" == f"{expected:.4g}"


def test_smollm2_equals_the_documented_loop(smollm2: nn.Module, smollm2_tokenizer: object) -> None:
    ids = torch.tensor([smollm2_tokenizer.encode(default_corpus().text)[:64]])
    with torch.no_grad():
        expected = math.exp(float(smollm2(ids, labels=ids).loss))
    found = perplexity(smollm2, tokenizer=smollm2_tokenizer, window=64, max_tokens=64)
    assert f"{found.measurements[0].value:.4g}" == f"{expected:.4g}"


@pytest.mark.slow
def test_smollm2_equals_the_documented_loop_over_many_windows(
    smollm2: nn.Module, smollm2_tokenizer: object
) -> None:
    check_against_documented_loop(smollm2, smollm2_tokenizer, 4096, 1024, 512)


def test_our_decoder_goes_through_its_head_in_slices() -> None:
    models = pytest.importorskip("deepseek.models")
    config = models.DecoderConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=512,
        init_std=0.3,
    )
    model = models.Decoder(config)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out[..., 0].numel()))
    ids = list(TEXT.encode()[:400])
    through_head = token_losses(model, ids, 400, 200)
    assert max(rows) <= ROWS_PER_SLICE
    whole = token_losses(lambda input_ids: model(input_ids), ids, 400, 200)
    assert torch.allclose(through_head, whole, atol=1e-5)

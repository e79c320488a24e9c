"""The graph of tensors that exports start from says what the model says: every family, padding on
both sides, and texts read in pieces."""

from __future__ import annotations

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.export.captured import Capture
from deepseek.export.traced import TracedDecoder, TracedEncoder, past_shapes, why_not_traced
from deepseek.hub import Bundle, save
from deepseek.models import Decoder
from deepseek.models.config import GateConfig, LatentConfig, Pattern
from tests.generate.encoders import tiny_encoder
from tests.hub.tiny import tiny_decoder
from tests.models.zoo import CASES, TINY, ours, randomize, reference
from tests.tolerances import assert_close

LATENT = LatentConfig(kv_rank=16, nope_dim=6, rope_dim=4, value_dim=5)
OWN = {
    "alibi": TINY.replace(positions="alibi"),
    "gates": TINY.replace(gates=GateConfig(threshold=0.9)),
    "pattern": TINY.replace(pattern=Pattern(block_size=16)),
    "latent": TINY.replace(num_kv_heads=4, latent=LATENT),
}
REFUSED = (
    "llama-dynamic",
    "qwen3-moe",
    "qwen3-moe-mixed",
    "deepseek-v3",
    "deepseek-v3-full-query",
    "pattern",
)


def model_of(case: str) -> Decoder:
    if case not in OWN:
        return ours(reference(case)).eval()
    model = Decoder(OWN[case])
    randomize(model)
    return model.eval()


def padded(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and a mask: whole rows, rows padded on the left, on the right, and on both."""
    ids = torch.randint(0, 40, (rows, length))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, -3:] = 0, 0
    mask[3, :2], mask[3, -2:] = 0, 0
    return ids, mask


def empty(model: Decoder, rows: int) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in past_shapes(model.config, rows, 0)]


@pytest.mark.parametrize("case", [name for name in (*CASES, *OWN) if name not in REFUSED])
def test_a_decoder_says_the_same(case: str) -> None:
    model = model_of(case)
    graph = TracedDecoder(model)
    ids, mask = padded(4, 83 if "window" in case else 17)
    with torch.inference_mode():
        expected = model(ids, mask).logits
        found = graph(ids, mask, mask[:, :0], *empty(model, 4))[0]
    assert found.isfinite().all()
    assert_close(found[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("case", [name for name in (*CASES, *OWN) if name not in REFUSED])
def test_a_text_read_in_pieces_is_the_text(case: str) -> None:
    model = model_of(case)
    graph = TracedDecoder(model)
    ids, mask = padded(4, 83 if "window" in case else 17)
    past = empty(model, 4)
    pieces = []
    with torch.inference_mode():
        expected = graph(ids, mask, mask[:, :0], *past)[0]
        start = 0
        for size in (1, 5, 1, ids.shape[1] - 7):
            end = start + size
            inputs = ids[:, start:end], mask[:, start:end], mask[:, :start]
            logits, *fresh = graph(*inputs, *past)
            past = [torch.cat(pair, 3) for pair in zip(past, fresh, strict=True)]
            pieces.append(logits)
            start = end
    assert_close(torch.cat(pieces, 1)[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_graph_is_refused(case: str) -> None:
    model = model_of(case)
    assert why_not_traced(model.config) is not None
    with pytest.raises(ConfigError, match="a graph of tensors from ids to logits"):
        TracedDecoder(model)


@pytest.mark.parametrize("labels", [(), ("no", "yes", "perhaps")])
def test_an_encoder_says_the_same(labels: tuple[str, ...]) -> None:
    model = tiny_encoder(labels=labels)
    ids, mask = padded(4, 17)
    with torch.inference_mode():
        said = model(ids, mask)
        found = TracedEncoder(model)(ids, mask)
    if labels:
        mask = mask[:, :1]  # a text whose first token is padding has no class
        assert said.logits is not None
        return assert_close(found[mask[:, 0] == 1], said.logits[mask[:, 0] == 1])
    return assert_close(found[mask == 1], said.last_hidden_state[mask == 1])


def test_a_capture_is_of_any_batch_length_and_past(tmp_path) -> None:
    save(tiny_decoder(), tmp_path / "a")
    captured = Capture.of(Bundle.open(tmp_path / "a"), max_tokens=32, max_batch=4)
    model = tiny_decoder()
    module = captured.follow().module()
    for rows, length, past in ((1, 1, 0), (4, 32, 0), (3, 1, 31), (1, 7, 25), (2, 5, 3)):
        ids = torch.randint(0, 96, (rows, length))
        masks = torch.ones_like(ids), torch.ones(rows, past, dtype=torch.int64)
        inputs = ids, *masks, *map(torch.randn, past_shapes(model.config, rows, past))
        with torch.inference_mode():
            expected, found = TracedDecoder(model)(*inputs), module(*inputs)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


def test_bounds_that_a_model_has_not_are_refused(tmp_path) -> None:
    save(tiny_decoder(), tmp_path / "a")
    bundle = Bundle.open(tmp_path / "a")
    with pytest.raises(ConfigError, match="from 5 to 128"):
        Capture.of(bundle, max_tokens=129, max_batch=1)
    with pytest.raises(ConfigError, match="max_batch"):
        Capture.of(bundle, max_tokens=32, max_batch=0)

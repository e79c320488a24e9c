"""lm-eval through the server says what the model says in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deepseek
from deepseek.models import Decoder
from deepseek.serve import local_server
from tests.ops.native import NEEDS_KERNELS
from tests.serve.bundles import tiny_bundle

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval comes with the extra `eval`")

PAIRS = [
    ("The capital of France is", " Paris"),
    ("One, two, three,", " four, five"),
    ("a" * 100, "b"),
    ("", "Once upon a time"),
    ("The capital of France is", " Rome"),
]


def expected(model: Decoder, context: str, continuation: str) -> tuple[float, bool]:
    """Return log-likelihood and whether every token is the likeliest, from one pass."""
    assert model.tokenizer is not None
    before = model.tokenizer.encode(context, add_special_tokens=False)
    before = before or [model.tokenizer.bos_token_id]
    after = model.tokenizer.encode(continuation, add_special_tokens=False)
    with torch.inference_mode():
        logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    rows = logits[len(before) - 1 : -1]
    total = float(rows[torch.arange(len(after)), torch.tensor(after)].sum())
    return total, rows.argmax(-1).tolist() == after


@pytest.mark.slow
@NEEDS_KERNELS
def test_log_likelihoods_and_answers_are_those_of_the_model(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = tiny_bundle(tmp_path)
    model = deepseek.load(folder, dtype="float32")
    assert isinstance(model, Decoder) and model.tokenizer is not None
    options = ["--pages", "100", "--name", "tiny", "--scheme", "float32"]
    with local_server(folder, options) as server:
        peer = LocalCompletionsAPI(
            model="tiny",
            base_url=f"{server.url}/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(folder),
            max_length=512,
            num_concurrent=3,
            batch_size=2,
        )
        asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(PAIRS)]
        found = peer.loglikelihood(asked)
        for pair, (total, is_greedy) in zip(PAIRS, found, strict=True):
            wanted, wanted_greedy = expected(model, *pair)
            assert total == pytest.approx(wanted, abs=2e-3), pair
            assert bool(is_greedy) == wanted_greedy
        until = {"until": ["."], "max_gen_toks": 12, "do_sample": False, "temperature": 0}
        texts = peer.generate_until([Instance("generate_until", {}, ("Once upon", until), 0)])
        whole = model.generate("Once upon", max_tokens=12, stop=".")
        assert texts[0].split(".")[0] == whole.text.split(".")[0]

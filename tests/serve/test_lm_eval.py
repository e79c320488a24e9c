"""lm-eval through the server says what the model says in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepseek
from deepseek.evaluate import addition_items, exact_match, multiple_choice, next_sentence_items
from deepseek.models import Decoder
from deepseek.serve import LocalServer, local_server
from tests.evaluate.harness import CHOICE, MATCH, PATTERN, run_harness
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


def peer_of(server: LocalServer, folder: Path, **settings: Any) -> Any:
    """Return a server as lm-eval asks it, with the tokenizer of a folder."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model=folder.name,
        base_url=f"{server.url}/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(folder),
        num_concurrent=3,
        batch_size=2,
        **settings,
    )


@pytest.mark.slow
@NEEDS_KERNELS
def test_log_likelihoods_and_answers_are_those_of_the_model(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    folder = tiny_bundle(tmp_path)
    model = deepseek.load(folder, dtype="float32")
    assert isinstance(model, Decoder) and model.tokenizer is not None
    options = ["--pages", "100", "--name", folder.name, "--scheme", "float32"]
    with local_server(folder, options) as server:
        peer = peer_of(server, folder, max_length=512)
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


@pytest.mark.slow
@NEEDS_KERNELS
@pytest.mark.filterwarnings("default")
def test_tasks_through_the_server_are_those_in_process(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    """SmolLM2 on a few items of two tasks: the same scores, answers and metrics."""
    model = deepseek.load(smollm2_folder, dtype="float32")
    assert isinstance(model, Decoder) and model.tokenizer is not None
    choices, sums = next_sentence_items(12, seed=1), addition_items(6, seed=1)
    chosen = multiple_choice(model, choices, tokenizer=model.tokenizer)
    matched = exact_match(model, sums, tokenizer=model.tokenizer, max_gen_toks=8, pattern=PATTERN)
    options = ["--name", smollm2_folder.name, "--scheme", "float32", "--pages", "300"]
    with local_server(smollm2_folder, options) as server:
        peer = peer_of(server, smollm2_folder, max_length=2048)
        results, samples = run_harness(peer, choices, CHOICE, tmp_path)
        for item, sample in zip(chosen.items, samples, strict=True):
            theirs = [float(response[0]) for response in sample["filtered_resps"]]
            assert item.log_likelihoods == pytest.approx(theirs, abs=2e-3)
            assert float(item.chosen == item.answer) == sample["acc"]
        for measurement in chosen.measurements:
            assert measurement.value == pytest.approx(results[f"{measurement.name},none"])
        results, samples = run_harness(peer, sums, MATCH, tmp_path)
    for item, sample in zip(matched.items, samples, strict=True):
        assert item.extracted == sample["filtered_resps"][0]
    assert matched.measurements[0].value == pytest.approx(results["exact_match,number"])

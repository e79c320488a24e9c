"""Generation with early exits: what rows give, what is told, what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import hub
from deepseek.data import Tokenizer
from deepseek.errors import ConfigError
from deepseek.generate import Completion, Exits, Memory, Sampling, build_engine, generate, stream
from deepseek.generate.modules import weights_of
from deepseek.models import Decoder, forward_with_exits
from deepseek.ops.scheme import Scheme
from deepseek.records import Measurement
from tests.generate.conftest import TINY, byte_tokenizer
from tests.house import REPO
from tests.ops.native import NEEDS_KERNELS

EXITS = Exits(layers=(1, 2, 3), threshold=0.2)


def deep(**changes: Any) -> Decoder:
    torch.manual_seed(5)
    return Decoder(TINY.replace(num_layers=4, **changes)).eval()


def draw(*lengths: int) -> list[list[int]]:
    return [torch.randint(TINY.vocab_size, (length,)).tolist() for length in lengths]


def completed(model: Decoder, prompt: list[int], **options: Any) -> Completion:
    found = generate(model, prompt, **{"max_tokens": 30, "ignore_eos": True, **options})
    assert isinstance(found, Completion)
    return found


def test_tokens_are_those_of_passes_by_hand() -> None:
    model, (prompt,) = deep(), draw(9)
    found = completed(model, prompt, exits=EXITS)
    cache = model.new_cache(1, 64)
    with torch.inference_mode():
        tokens = [int(model(torch.tensor([prompt]), cache=cache).logits[0, -1].argmax())]
        depths = [4]
        while len(tokens) < 30:
            output = forward_with_exits(model, torch.tensor([tokens[-1:]]), cache, EXITS)
            tokens.append(int(output.logits[0, -1].argmax()))
            depths.append(int(output.depths[0, 0]))
    assert found.token_ids == tuple(tokens)
    assert found.depths == tuple(depths)
    assert len(set(depths)) > 2
    assert json.loads(json.dumps(found.to_dict()))["depths"] == depths


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=3)])
def test_rows_leave_where_they_leave_alone(sampling: Sampling | None) -> None:
    model, prompts = deep().double(), draw(5, 1, 33, 90)
    together = generate(model, prompts, max_tokens=20, exits=EXITS, sampling=sampling)
    assert isinstance(together, list)
    for row, (prompt, one) in enumerate(zip(prompts, together, strict=True)):
        own = None if sampling is None else sampling.replace(seed=3 + row)
        alone = completed(model, prompt, max_tokens=20, exits=EXITS, sampling=own)
        assert (one.token_ids, one.depths) == (alone.token_ids, alone.depths)
    assert len({depth for one in together for depth in one.depths or ()}) > 2


def test_where_none_leaves_the_tokens_are_the_ordinary_ones() -> None:
    model, (prompt,) = deep(), draw(20)
    found = completed(model, prompt, exits=EXITS.replace(threshold=1.0))
    model.impl = "sdpa"  # through the modules, as exits do
    expected = completed(model, prompt)
    assert found.token_ids == expected.token_ids
    assert found.depths == (4,) * 30 and expected.depths is None


def test_exits_go_with_a_memory() -> None:
    model, (prompt,) = deep(max_positions=512), draw(500)
    memory = Memory(max_len=512, mem_len=256, first=64)
    found = completed(model, prompt, exits=EXITS, memory=memory, max_tokens=60)
    assert len(found.token_ids) == 60 and len(set(found.depths or ())) > 1


def test_pieces_say_how_deep_they_went() -> None:
    model, (prompt,) = deep(), draw(9)
    pieces = list(stream(model, prompt, max_tokens=12, exits=EXITS))
    assert (
        tuple(piece.depth for piece in pieces)
        == completed(model, prompt, max_tokens=12, exits=EXITS).depths
    )
    assert all(piece.depth is None for piece in stream(model, prompt, max_tokens=3))


def test_what_cannot_leave_early_is_told() -> None:
    model, (prompt,) = deep(), draw(3)
    with pytest.raises(ConfigError, match="must be an Exits"):
        completed(model, prompt, exits=0.5)
    with pytest.raises(ConfigError, match="below the model's 4 layers"):
        completed(model, prompt, exits=Exits(layers=(4,), threshold=0.5))
    vars(model)["scheme"] = Scheme.named("int8")
    with pytest.raises(ConfigError, match="Load it without a scheme"):
        completed(model, prompt, exits=EXITS)


@NEEDS_KERNELS
def test_an_engine_lets_no_token_leave_early() -> None:
    model = deep()
    engine = build_engine(model.config, weights_of(model), Scheme.named("float32"), threads=1)
    with pytest.raises(ConfigError, match="None on an engine"):
        generate(engine, [1, 2], exits=EXITS)


def run_benchmark(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    text = folder / "text.txt"
    text.write_text("\n\n".join("".join(random.Random(0).choices("abc ", k=2500)) for _ in "12345"))
    model = deep()
    byte_tokenizer(eos_token="<end>").save(folder)
    model.tokenizer = Tokenizer.from_folder(folder)
    hub.save(model, folder / "model")
    command = [sys.executable, "benchmarks/early_exit.py", "--model", str(folder / "model")]
    command += ["--text", str(text), *words]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True)


def test_the_benchmark_draws_a_curve(tmp_path: Path) -> None:
    words = ["--thresholds", "0.5", "0", "--layers", "2", "--new-tokens", "4", "--rounds", "1"]
    done = run_benchmark(tmp_path, "--texts", "3", "--json", *words)
    assert done.returncode == 0, done.stderr
    listed = [Measurement.from_dict(each) for each in json.loads(done.stdout)["measurements"]]
    found = {(each.name, each.conditions["threshold"]): each.value for each in listed}
    assert found["mean_layers", 1.0] == found["mean_layers_generated", 1.0] == 4
    assert found["disagreement", 1.0] == 0
    assert found["mean_layers", 0] == 2 and found["disagreement", 0] > 0
    assert found["weights_share", 1.0] > 1 > found["weights_share", 0]
    assert found["decode_tokens_per_s", "whole model"] > 0


def test_a_text_without_a_document_is_one_line(tmp_path: Path) -> None:
    done = run_benchmark(tmp_path, "--tokens", "90000")
    assert done.returncode == 1
    assert done.stderr.startswith("early exit: text of the benchmark of early exit must be")
    assert len(done.stderr.splitlines()) == 1

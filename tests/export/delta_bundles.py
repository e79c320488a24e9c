"""Two versions of a small model on one grid, keys, and packages, as tests of deltas need them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek import hub
from deepseek.export.delta import make_delta, make_keys
from deepseek.export.delta.keys import private_key
from deepseek.export.delta.package import MAGIC, head_of
from deepseek.hub import Quantized
from deepseek.hub.atomic import files_in
from deepseek.ops.quantized import QuantizedWeight
from tests.grids import Kind, put_on_grids
from tests.hub.tiny import tiny_decoder, tiny_tokenizer

INT8: dict[str, Kind] = {"": (8, None, True)}
INT4: dict[str, Kind] = {"": (4, 32, False)}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a package is made of, and the package."""

    old: Path
    new: Path
    package: Path
    key: Path
    trust: Path


def make_case(folder: Path, kinds: dict[str, Kind] = INT8, **settings: Any) -> Case:
    """Make two versions and the package between them; a hundredth of the codes differ by one."""
    model = tiny_decoder(vocab_size=330)
    model.tokenizer = tiny_tokenizer()
    weights = put_on_grids(model, kinds)
    quantized = {"layout": settings.pop("layout", "compressed-tensors")}
    hub.save(model, folder / "old", quantized=Quantized(weights=weights, **quantized), **settings)
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        weights[name] = stepped(weight, generator)
        model.get_parameter(name).data.copy_(weights[name].values())
    model.model.norm.weight.data.add_(0.01)
    hub.save(model, folder / "new", quantized=Quantized(weights=weights, **quantized), **settings)
    key, trust = make_keys(folder / "key")
    make_delta(folder / "old", folder / "new", folder / "package", key)
    return Case(folder / "old", folder / "new", folder / "package", key, trust)


def stepped(weight: QuantizedWeight, generator: torch.Generator) -> QuantizedWeight:
    """Return a weight a hundredth of whose codes are one lower."""
    moves = torch.rand(weight.codes.shape, generator=generator) < 0.01
    lower = weight.codes - (moves & (weight.codes > 1)).to(torch.uint8)
    return dataclasses.replace(weight, codes=lower)


def contents(folder: Path, *, but: tuple[str, ...] = ("bundle.json",)) -> dict[str, str]:
    """Return the hash of every file of a folder."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in files_in(folder)
        if name not in but
    }


def signed_again(case: Case, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a package whose manifest was changed, signed by the trusted key: what a maker with a
    defect, or a thief of the key, could send."""
    data = case.package.read_bytes()
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    manifest = json.loads(data[start : start + length])
    change(manifest)
    text = json.dumps(manifest).encode()
    target.write_bytes(head_of(text, private_key(case.key)) + data[start + length + 96 :])
    return target

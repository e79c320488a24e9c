"""Writes what was fetched as a bundle: GGUF weights are expanded, a folder is copied."""

from __future__ import annotations

import collections
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from deepseek.hub.atomic import files_in
from deepseek.hub.bundle import Bundle, read_json
from deepseek.hub.gguf import GgufFile, read_gguf
from deepseek.hub.gguf_model import generation_config, hf_config, hf_tensors, tensor_shapes
from deepseek.hub.gguf_tokenizer import read_tokenizer
from deepseek.hub.grids import read_grids, without_grids
from deepseek.hub.loading import DTYPES, check_weights
from deepseek.hub.names import NamedModel
from deepseek.hub.safetensors import TensorEntry, read_entries, write_tensors
from deepseek.hub.saving import About, write_bundle, write_settings
from deepseek.hub.sources import Fetched, Report
from deepseek.hub.wheel import is_model_file
from deepseek.models.families import config_from_hf, config_to_hf
from deepseek.records import FileRecord, StageRecord


def convert(
    fetched: Fetched,
    target: Path,
    name: str,
    named: NamedModel | None,
    dtype: str,
    report: Report,
) -> Bundle:
    """Return the bundle made in `target` of a model that was fetched.

    Args:
        fetched: a model folder or a GGUF file, and what it came from.
        target: the folder to make or to replace.
        name: what the bundle is called.
        named: the table's entry, for summary and licence.
        dtype: name of the dtype that weights out of a GGUF file become.
        report: is told what is being done.

    Raises:
        FormatError: the model is damaged, of an unknown family, or does not fit its config.
        CapacityError: the disk is full; `target` is as it was.
    """
    about = About(
        name=name,
        summary=named.summary if named else fetched.summary,
        license=named.license if named else fetched.license,
        parents=fetched.parents,
        attention=fetched.attention,
    )
    if fetched.path.is_file():
        return _from_gguf(read_gguf(fetched.path), target, DTYPES[dtype], fetched, about, report)
    return _from_folder(fetched, target, about, report)


def _from_gguf(
    file: GgufFile, target: Path, dtype: torch.dtype, fetched: Fetched, about: About, report: Report
) -> Bundle:
    config = config_to_hf(config_from_hf(hf_config(file)))
    check_weights(config, tensor_shapes(file), str(file.path))
    name = str(dtype).removeprefix("torch.")
    tokenizer = read_tokenizer(file)
    stored = collections.Counter(tensor.stored.name for tensor in file.tensors.values())
    settings = {
        "source": fetched.address,
        "file": file.path.name,
        "dtype": name,
        "stored_types": dict(stored),
    }
    license = about.license or file.text("general.license", "")
    summary = about.summary or file.text("general.name", "")

    def write(fresh: Path) -> Mapping[str, FileRecord]:
        write_settings(fresh, config | {"dtype": name}, tokenizer, generation_config(file))
        return write_tensors(
            fresh,
            hf_tensors(file, dtype, lambda share: report(f"converting {file.path.name}", share)),
        )

    stage = StageRecord(name="pull", settings=settings)
    return write_bundle(
        target, write, dataclasses.replace(about, stage=stage, license=license, summary=summary)
    )


def _from_folder(fetched: Fetched, target: Path, about: About, report: Report) -> Bundle:
    entries = read_entries(fetched.path)
    config = read_json(fetched.path / "config.json")
    grids = read_grids(fetched.path, config, entries)
    weights = {**without_grids(entries, grids), **grids}
    shapes = {name: torch.empty(each.shape, device="meta") for name, each in weights.items()}
    check_weights(config, shapes, str(fetched.path))
    names = _files(fetched.path, entries)

    def write(fresh: Path) -> Mapping[str, FileRecord]:
        for number, name in enumerate(names, start=1):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched.path / name, fresh / name)
            report(f"copying {name}", number / len(names))
        return {}

    stage = StageRecord(name="pull", settings={"source": fetched.address, "dtype": "as stored"})
    return write_bundle(target, write, dataclasses.replace(about, stage=stage))


def _files(folder: Path, entries: Mapping[str, TensorEntry]) -> list[str]:
    """Return the files of a model folder to take: of top-level weights only those that are the
    model's.
    """
    weights = {entry.file for entry in entries.values()}
    return [
        name
        for name in files_in(folder)
        if is_model_file(name)
        and (name in weights or "/" in name or not name.endswith(".safetensors"))
    ]

"""Which tolerance an export is held to, by what its manifest says of its numbers."""

from __future__ import annotations

from pathlib import Path

from deepseek.export.manifest import MANIFEST, Manifest
from deepseek.export.verifying.compare import Tolerance, tolerance_named
from deepseek.export.verifying.source import kind_of_model
from deepseek.hub import Bundle
from deepseek.models import Decoder, Encoder

_FLOATS = {"F16": "float16", "BF16": "bfloat16"}


def tolerance_of(exported: Path, model: Decoder | Encoder) -> Tolerance:
    """Return what an export may be off by.

    Weights that were rounded for it are held to their own width. Weights that the source holds on
    grids are the same numbers there, but a runtime that rounds the inputs of their products is
    held to int8. Whatever else has a manifest, or has none, is held to float32.

    Args:
        exported: what `export` wrote, or a single file.
        model: the source.

    Raises:
        FormatError: the manifest is none.
    """
    kind = kind_of_model(model)
    folder = exported if exported.is_dir() else exported.parent
    if not (folder / MANIFEST).is_file():
        return tolerance_named("float32", kind)
    manifest = Manifest.read(folder)
    asked = manifest.options.get("quantize") or _FLOATS.get(manifest.options.get("floats", ""))
    if asked is None and manifest.format == "onnx":
        rounds_inputs = manifest.options.get("activations", "int8") == "int8"
        has_grids = isinstance(model.bundle, Bundle) and bool(model.bundle.grids)
        asked = "int8" if rounds_inputs and has_grids else None
    return tolerance_named(asked or "float32", kind)

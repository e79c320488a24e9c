"""The formats that a model is exported to: what each is, who writes it and who reads it back.

A format has a writer, which makes files from a model, and where its runtime can be had a reader,
which runs those files by that foreign runtime. `verify` compares a reader with the source model and
knows nothing else of a format. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.export.manifest import MANIFEST, Manifest
from deepseek.hub.atomic import files_in, replace_folder
from deepseek.hub.bundle import Bundle
from deepseek.hub.store import resolve
from deepseek.models.config import EncoderConfig
from deepseek.models.families import config_from_hf

Kind = Literal["decoder", "encoder", "classifier"]
"""What a model answers with: logits of each token, vectors of each token, logits of each label."""
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Progress = Callable[[str, float | None], None]
"""Called with what is being done and the share of it that is done, None where that is unknown."""

ENTRY_POINTS = "deepseek.formats"
"""Group of entry points by which a package adds formats: each names a `Format`."""


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    format: str
    folder: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    """What a user should know of it, a line each: what was rounded, what was left out."""


class Reader(Protocol):
    """An exported model, run by a foreign runtime.

    `forward` is the whole contract; what a format cannot do is said by `kind`, `max_tokens` and
    `has_cache`, and nothing is asked of it then.
    """

    name: str
    """Of the runtime with its version: `onnxruntime 1.32.0`."""
    kind: Kind
    max_tokens: int
    """Longest text it takes."""
    max_batch: int
    has_cache: bool
    """Whether `step` can be called."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        """Return what the model answers for a batch.

        Args:
            ids: [batch, tokens].
            mask: [batch, tokens], 1 where there is a token and 0 where there is padding, on
                whichever side; the answers there may be anything.

        Returns:
            [batch, tokens, vocabulary] of a decoder, [batch, tokens, width] of an encoder,
            [batch, labels] of a classifier.
        """
        ...

    def step(self, ids: Ids, state: object | None) -> tuple[Floats, object]:
        """Read more tokens behind what was read: logits [batch, tokens, vocabulary], new state.

        Args:
            ids: [batch, tokens].
            state: what the step before returned; None for the beginning. It is not changed.
        """
        ...

    def layers(self, ids: Ids, mask: Ids) -> Sequence[Floats] | None:
        """Return the states behind each layer, [batch, tokens, width] each, as `hidden_states[1:]`
        of the source has them (a decoder's last one is normed); None if it cannot."""
        ...


@dataclass(frozen=True)
class Format:
    """A format, and the places of its writer and reader, imported on first use."""

    name: str
    summary: str
    writer: str
    """`module:function`, called as `function(bundle, folder, **options) -> Exported`. It writes
    into an empty folder that takes its place when all is done, with the manifest beside it."""
    reader: str | None
    """`module:function`, called as `function(folder) -> Reader`, and with `threads=` where it was
    asked for; of a single file without a manifest, with its path. None where none runs here."""
    kinds: frozenset[Kind] = frozenset({"decoder", "encoder", "classifier"})
    extra: str | None = None
    """Of `pip install 'deepseek-stack[…]'`, which brings the writer and the reader."""
    options: frozenset[str] = field(default_factory=frozenset)
    """Names of the options its writer takes."""
    reports: bool = False
    """Whether its writer also takes `progress`."""
    suffix: str = ""
    """Of the file by which a folder without a manifest is known, such as `.onnx`."""
    packages: tuple[str, ...] = ()
    """What the writer and the reader import; they run here where these are installed."""
    why_no_reader: str = ""
    """Where `reader` is None: what it takes to run the files, as a person reads it."""


FORMATS: dict[str, Format] = {
    "onnx": Format(
        "onnx",
        "ONNX Runtime and what imports ONNX; a decoder with its key/value cache",
        writer="deepseek.export.onnx.writer:write",
        reader="deepseek.export.onnx.reader:OnnxReader",
        extra="export",
        options=frozenset({"optimize", "quantize", "activations"}),
        reports=True,
        suffix=".onnx",
        packages=("onnx", "onnxruntime"),
    ),
    "openvino": Format(
        "openvino",
        "OpenVINO on Intel processors and accelerators; a decoder with its key/value cache",
        writer="deepseek.export.openvino:write",
        reader="deepseek.export.openvino:read",
        extra="openvino",
        reports=True,
        suffix=".xml",
        packages=("onnx", "openvino"),
    ),
    "torch": Format(
        "torch",
        "PyTorch's AOTInductor: machine code for one processor, run without the model's Python",
        writer="deepseek.export.aoti:write",
        reader="deepseek.export.aoti:read",
        options=frozenset({"max_tokens"}),
        reports=True,
        suffix=".pt2",
        packages=("torch",),
    ),
    "executorch": Format(
        "executorch",
        "ExecuTorch on phones and small machines, its products by XNNPACK",
        writer="deepseek.export.executorch:write",
        reader="deepseek.export.executorch:read",
        extra="executorch",
        options=frozenset({"quantize", "max_tokens", "max_batch"}),
        reports=True,
        suffix=".pte",
        packages=("executorch",),
    ),
    "tensorrt": Format(
        "tensorrt",
        "a plan by which TensorRT makes its engine on the machine that has the GPU",
        writer="deepseek.export.tensorrt:write",
        reader=None,
        extra="export",
        options=frozenset({"precision", "max_tokens", "max_batch"}),
        reports=True,
        packages=("onnx",),
        why_no_reader="TensorRT on an NVIDIA GPU, by build.sh",
    ),
    "triton": Format(
        "triton",
        "a model repository for Triton Inference Server and its ONNX Runtime backend",
        writer="deepseek.export.triton:write",
        reader=None,
        extra="export",
        options=frozenset({"max_batch"}),
        reports=True,
        packages=("onnx",),
        why_no_reader="tritonserver --model-repository FOLDER",
    ),
    "gguf": Format(
        "gguf",
        "llama.cpp, Ollama and what stands on them",
        writer="deepseek.export.gguf:write",
        reader=None,
        kinds=frozenset({"decoder"}),
        options=frozenset({"floats"}),
        suffix=".gguf",
        packages=("gguf",),
        why_no_reader="llama.cpp",
    ),
}
"""Those that are built in, by name, in the order they are shown; `known_formats` has all."""


def known_formats() -> dict[str, Format]:
    """Return the formats that are built in and those that installed packages add, by name.

    Raises:
        ConfigError: what a package names under `deepseek.formats` is no `Format`.
    """
    found = dict(FORMATS)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        format = point.load()
        if not isinstance(format, Format):
            raise ConfigError(describe(point.value, ENTRY_POINTS, "a Format", format))
        found.setdefault(format.name, format)
    return found


def format_named(name: str) -> Format:
    """Return a format.

    Raises:
        ConfigError: there is none of this name.
    """
    found = known_formats()
    if name not in found:
        step = "See: deepseek export --formats"
        raise ConfigError(describe("format", "export", f"one of {', '.join(found)}", name, step))
    return found[name]


def missing_packages(format: Format) -> tuple[str, ...]:
    """Return what is not installed of the packages that a format needs."""
    return tuple(name for name in format.packages if importlib.util.find_spec(name) is None)


def export(
    source: Bundle | str | Path,
    format: str | Format,
    folder: str | Path,
    *,
    progress: Progress | None = None,
    **options: object,
) -> Exported:
    """Write a model in another runtime's format.

    Args:
        source: a bundle, or its name or folder.
        format: name of one of `known_formats`, or a format.
        folder: where its files go, with `export.json` and the tokenizer's; made whole or not at
            all. What an earlier export left there is replaced.
        progress: called with what is done and the share of it.
        options: of the format.

    Raises:
        ConfigError: an unknown format, an option it does not take, a model it cannot hold.
        MissingExtra: the extra that brings the format is not installed.
        FormatError: the source is not a whole model.
    """
    chosen = format_named(format) if isinstance(format, str) else format
    unknown = sorted(set(options) - chosen.options)
    if unknown:
        must = f"one of {', '.join(sorted(chosen.options))}" if chosen.options else "none"
        raise ConfigError(describe("option", f"format {chosen.name}", must, unknown[0]))
    bundle = source if isinstance(source, Bundle) else _bundle(source)
    kind = kind_of(bundle)
    if kind not in chosen.kinds:
        must = f"one of {', '.join(sorted(chosen.kinds))}"
        raise ConfigError(describe("model", f"format {chosen.name}", must, kind))
    target = Path(folder)
    _check_target(target)
    with replace_folder(target) as fresh:
        given = {**options, "progress": progress} if chosen.reports else options
        made = load_place(chosen.writer)(bundle, fresh, **given)
        assert isinstance(made, Exported)
        _copy_tokenizer(bundle, fresh)
        Manifest.of(fresh, chosen.name, kind, bundle, options, made.notes).write(fresh)
    names = [path.relative_to(fresh) for path in made.files]
    return dataclasses.replace(made, folder=target, files=tuple(target / name for name in names))


def open_exported(
    folder: str | Path, format: str | Format | None = None, *, threads: int | None = None
) -> Reader:
    """Open exported files in their foreign runtime.

    Every file is compared with the manifest first, where there is one.

    Args:
        folder: what `export` wrote, or a single file.
        format: its name, or it; None to know it by its manifest, or by the ending of its file.
        threads: to compute with; None for the runtime's own choice.

    Raises:
        ConfigError: no reader for them here. FormatError: files that are not whole.
        MissingExtra: the runtime is not installed.
    """
    path = Path(folder)
    if path.is_file() and (path.parent / MANIFEST).is_file():
        path = path.parent
    if (path / MANIFEST).is_file():
        manifest = Manifest.read(path)
        manifest.check(path)
        format = format or manifest.format
    format = format or _format_of(path)
    chosen = format_named(format) if isinstance(format, str) else format
    if chosen.reader is None:
        step = f"Run them with {chosen.why_no_reader}" if chosen.why_no_reader else ""
        raise ConfigError(describe("format", str(path), "one that is read here", chosen.name, step))
    settings = {} if threads is None else {"threads": threads}
    return cast("Reader", load_place(chosen.reader)(path, **settings))


def kind_of(bundle: Bundle) -> Kind:
    """Return what a model answers with."""
    config = config_from_hf(bundle.config)
    if not isinstance(config, EncoderConfig):
        return "decoder"
    return "classifier" if config.labels else "encoder"


def load_place(place: str) -> Callable[..., object]:
    """Return the function at a `module:function`."""
    module, _, name = place.partition(":")
    return cast("Callable[..., object]", getattr(importlib.import_module(module), name))


def _bundle(source: str | Path) -> Bundle:
    path = resolve(source)
    if path.is_file():
        step = "Make a bundle of it first: deepseek pull FILE.gguf --to FOLDER"
        raise ConfigError(describe("source", "export", "a bundle", str(path), step))
    return Bundle.open(path)


def _check_target(target: Path) -> None:
    """Refuse to replace a folder that no export made."""
    if not target.exists() or (target / MANIFEST).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        must = "new, empty, or one that an export made"
        raise ConfigError(describe("folder", "export", must, str(target), "Choose another folder"))


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


def _copy_tokenizer(bundle: Bundle, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (bundle.path / name).is_file():
            (folder / name).write_bytes((bundle.path / name).read_bytes())


def _format_of(path: Path) -> str:
    """Return the format that files without a manifest have, by their endings."""
    if not path.exists():
        raise ConfigError(describe("folder", "open_exported", "there", str(path)))
    names = [path.name] if path.is_file() else list(files_in(path))
    by_suffix: Mapping[str, str] = {
        each.suffix: each.name for each in known_formats().values() if each.suffix
    }
    found = {by_suffix[ending] for name in names if (ending := Path(name).suffix) in by_suffix}
    if len(found) != 1:
        must = f"an export: {MANIFEST}, or one kind of {', '.join(by_suffix)}"
        raise FormatError(describe("folder", str(path), must, sorted(found) or "neither"))
    return found.pop()

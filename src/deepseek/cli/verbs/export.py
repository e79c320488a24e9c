"""Write a model in another runtime's format, in a folder with its tokenizer and a manifest.

Weights that a bundle holds on grids of integers keep their codes, wherever the format has a place
for them. `--formats` says which formats there are and what of them runs here.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any, get_args

from deepseek.cli.models import positive, ready
from deepseek.cli.output import Output, size
from deepseek.cli.verbs.train import telling
from deepseek.errors import ConfigError, describe
from deepseek.records import Measurement

if TYPE_CHECKING:
    from deepseek.export import Exported, Format

EXAMPLE = "deepseek export smollm2-135m --format onnx --optimize --out runs/onnx"
_OPTIONS = (
    "optimize",
    "quantize",
    "activations",
    "floats",
    "precision",
    "max_tokens",
    "max_batch",
)
"""What is handed to a format's writer where it was given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek export`."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a name (smollm2-135m), a folder")
    parser.add_argument("--format", metavar="NAME", help="as --formats lists them")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--formats", action="store_true", help="list the formats and what of them runs here"
    )
    parser.add_argument(
        "--optimize",
        action="store_true",
        default=None,
        help="onnx: attention as ONNX Runtime's own operator, which other runtimes do not read",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="onnx, executorch (int8): round weights that are on no grid yet (none)",
    )
    parser.add_argument(
        "--activations",
        choices=("int8", "float32"),
        help="onnx: what products with weights on grids round their inputs to (int8)",
    )
    parser.add_argument(
        "--floats", choices=("F32", "F16", "BF16"), help="gguf: type of matrices on no grid"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16"),
        help="tensorrt: what the engine computes with (float32)",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        metavar="TOKENS",
        help="torch, executorch, tensorrt: longest text it will take (the model's; executorch 512)",
    )
    parser.add_argument(
        "--max-batch",
        type=positive,
        metavar="ROWS",
        help="executorch (1), tensorrt and triton (8): most texts at once",
    )
    parser.add_argument("--threads", type=positive, help="threads to compute with (all cores)")


def run(args: argparse.Namespace, out: Output) -> int:
    """Export, or list the formats."""
    if args.formats:
        return _list(out)
    for name in ("model", "format", "out"):
        if getattr(args, name) is None:
            shown = "MODEL" if name == "model" else f"--{name}"
            step = "See: deepseek export --help, or --formats"
            raise ConfigError(describe(shown, "deepseek export", "given", None, step))
    from deepseek.export import export
    from deepseek.export.formats import format_named

    format_named(args.format)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    name = ready(args.model, out)
    started = time.monotonic()
    with telling(out) as tell:
        made = export(
            name,
            args.format,
            args.out,
            progress=lambda words, share: tell(words, share or 0.0),
            **_given(args),
        )
    return _show(args, made, time.monotonic() - started, out)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in _OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def _show(args: argparse.Namespace, made: Exported, took_s: float, out: Output) -> int:
    sizes = {path.name: path.stat().st_size for path in made.files}
    for name, num_bytes in sizes.items():
        out.say(f"{made.folder / name}  {size(num_bytes)}")
    for note in made.notes:
        out.say(f"  {note}")
    result = {
        "format": made.format,
        "out": str(made.folder),
        "files": [{"name": name, "bytes": num_bytes} for name, num_bytes in sizes.items()],
        "notes": list(made.notes),
    }
    conditions = {"model": args.model, "format": made.format, **_given(args)}
    figures = (("exported_bytes", sum(sizes.values()), "bytes"), ("export_s", took_s, "s"))
    return out.finish(
        result,
        [
            Measurement(name=name, value=value, unit=unit, conditions=conditions)
            for name, value, unit in figures
        ],
    )


def _list(out: Output) -> int:
    """Show which formats there are, which of them are written and read here, and where else our
    files go."""
    from deepseek.export import known_formats
    from deepseek.export.targets import TARGETS

    rows = [_capabilities(each) for each in known_formats().values()]
    header = ("format", "holds", "written here", "read here", "options", "for")
    keys = ("format", "holds", "written", "read", "options", "summary")
    out.table("formats", header, [tuple(str(row[key]) for key in keys) for row in rows])
    fields = ("name", "takes", "compiler", "limits")
    shown = [tuple(getattr(each, name) for name in fields) for each in TARGETS]
    out.table("not run here", ("back end", "takes", "made by", "limits"), shown)
    return out.finish({"formats": rows, "targets": [dataclasses.asdict(each) for each in TARGETS]})


def _capabilities(format: Format) -> dict[str, str]:
    """Return what a format holds and whether it is written and read here, or why not."""
    from deepseek.export.formats import Kind, missing_packages

    missing = missing_packages(format)
    cure = f'pip install "deepseek-stack[{format.extra}]"' if format.extra else "install them"
    absent = f"no: {', '.join(missing)} missing; {cure}" if missing else ""
    read = absent or "yes"
    if format.reader is None:
        read = f"no: {format.why_no_reader or 'it has no reader here'}"
    kinds = ", ".join(sorted(format.kinds))
    return {
        "format": format.name,
        "holds": "all" if len(format.kinds) == len(get_args(Kind)) else kinds,
        "written": absent or "yes",
        "read": read,
        "options": ", ".join(sorted(format.options)),
        "summary": format.summary,
    }

"""AOTInductor packages: a model as machine code, which PyTorch's own loader runs without the
model's Python.

Source: https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

import contextlib
import json
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from deepseek.errors import BackendError, FormatError, describe
from deepseek.export.captured import Capture
from deepseek.export.formats import Exported, Progress
from deepseek.export.graph_reader import GraphReader
from deepseek.export.traced_reader import traced_reader
from deepseek.hub import Bundle

FILE = "model.pt2"
_MAX_BATCH = 1024
_ABOUT = "deepseek"
"""Key of what stands in a package's metadata."""


def write(
    bundle: Bundle,
    folder: Path,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Compile a model to `model.pt2` in a folder. Is a `Format`'s writer.

    Args:
        bundle: its weights are written in float32.
        folder: to write into.
        max_tokens: longest text; None for the model's own.
        progress: told what is being done.

    Raises:
        ConfigError: a model that is no plain graph of tensors.
        BackendError: no C++ compiler that works.
    """
    tell = progress or (lambda words, share: None)
    tell("following the model", None)
    capture = Capture.of(bundle, max_tokens=max_tokens, max_batch=_MAX_BATCH)
    program = capture.follow()
    about = {
        "kind": capture.kind,
        "max_tokens": capture.max_tokens,
        "past": [list(each.shape) for each in capture.inputs[3:]],
    }
    tell("compiling", None)
    path = folder / FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its own parts
        try:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={"aot_inductor.metadata": {_ABOUT: json.dumps(about)}},
            )
        except Exception as error:
            step = "Install g++ or clang++, or name one by CXX"
            got = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            must = "able to compile what PyTorch writes"
            raise BackendError(describe("C++ compiler", "export", must, got, step)) from error
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    note = f"machine code for {machine}: it runs on processors that have this"
    return Exported("torch", folder, (path,), (*capture.notes, note))


def read(folder: Path, *, threads: int | None = None) -> GraphReader:
    """Return the reader of a package. Is a `Format`'s reader.

    Args:
        folder: of `model.pt2`, or the file.
        threads: of PyTorch while it runs; None for what it has.

    Raises:
        FormatError: a file that is no package of ours.
    """
    path = folder / FILE if folder.is_dir() else folder
    try:
        package = torch._inductor.aoti_load_package(str(path))
        about = json.loads(package.get_metadata()[_ABOUT])
    except (RuntimeError, KeyError, OSError) as error:
        must = "an AOTInductor package that an export made"
        got = str(error).splitlines()[0]
        raise FormatError(describe("file", str(path), must, got)) from error

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        with _threads(threads), torch.inference_mode():
            found = package(*inputs)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    return traced_reader(
        run,
        name=f"AOTInductor {torch.__version__}",
        kind=about["kind"],
        max_tokens=about["max_tokens"],
        max_batch=_MAX_BATCH,
        past=about["past"],
    )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

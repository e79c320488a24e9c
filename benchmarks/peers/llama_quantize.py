"""llama.cpp's quantization of a decoder, read back by our own reader of GGUF."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek import hub
from deepseek.errors import BackendError, describe
from deepseek.export.gguf import write_gguf
from deepseek.hub.gguf import read_gguf
from deepseek.models import Decoder

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q4_K_M")


@dataclasses.dataclass(frozen=True)
class PeerModel:
    """What llama.cpp made of a model."""

    name: str
    model: Decoder
    """With the numbers that the file stands for, float32."""
    num_bytes: int
    """Of all tensors of the file, embedding included."""


def quantized(program: Path, model: Decoder, kinds: Sequence[str] = KINDS) -> Iterator[PeerModel]:
    """Yield a model in each of llama.cpp's types, from float32, without an importance matrix.

    Args:
        program: `llama-quantize`.
        model: in float32.
        kinds: of the file, as the program calls them.

    Raises:
        BackendError: the program fails.
    """
    with tempfile.TemporaryDirectory(prefix="deepseek-gguf-") as folder:
        whole = Path(folder) / "whole.gguf"
        write_gguf(model, whole, floats="F32")
        for kind in kinds:
            path = Path(folder) / f"{kind}.gguf"
            done = subprocess.run(
                [program, whole, path, kind], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                got = done.stderr.strip().splitlines()[-1:]
                raise BackendError(describe("llama-quantize", kind, "successful", got))
            read = hub.load(path, dtype="float32")
            assert isinstance(read, Decoder)
            size = sum(tensor.num_bytes for tensor in read_gguf(path).tensors.values())
            yield PeerModel(f"llama.cpp {kind}", read, size)
            path.unlink()

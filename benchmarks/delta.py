"""How small the delta of a real fine-tune is, what its grid costs, and what applying it takes.

    python -m benchmarks.delta runs/delta --prepare
    python -m benchmarks.delta runs/delta
    python -m benchmarks.delta runs/delta --cuts 200 --margins

`--prepare` makes what is measured: SmolLM2-135M trained for 30 steps of 2 x 128 tokens, all
weights, on the standard library's docstrings; the model before on an int8 grid; and both with their
channels in another order, the one before on an int4 grid (its own file lies on a 4-bit grid
already: see `benchmarks.compress_quantize`). The second line measures packages, peers where they
are installed (`zstandard`, `bsdiff4`, `detools`), and the time and memory of applying. `--cuts`
kills processes that apply, at random moments; it fails when a bundle is then neither the old nor
the new one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import lzma
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepseek.export.delta import make_delta, make_keys, on_grid_of, rollback
from deepseek.hub import Bundle

RUN = """
model: smollm2-135m
stages:
  - name: finetuned
    data: [{path: TEXT}]
    steps: 30
    length: 128
    batch: 2
    micro_batch: 2
    optimizer: {kind: adamw, rate: 1.5e-4}
    schedule: {kind: cosine, warmup_steps: 3}
"""
EXCERPT_BYTES = 16 << 20
"""Of the weights' files, for peers whose memory or time is many times their input's."""
APPLY = """
import sys, time
from pathlib import Path
from deepseek.export.delta import apply_delta, verify_delta
from deepseek.export.delta.keys import public_key
public_key(sys.argv[3])
import numpy, lzma

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10

before, start = most(), time.perf_counter()
print("ready", flush=True)
apply_delta(*sys.argv[1:4])
print(before, most(), time.perf_counter() - start)
"""
"""Prints the peak of the process's memory before and behind, and the seconds between."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A package, and what the grid costs that it stands on."""

    case: str
    way: str
    changed: float
    clipped: float
    package_bytes: int
    share: float
    entropy: float
    kl: float | None
    kl_own: float | None


def prepare(folder: Path, model: str) -> None:
    """Make what is measured; what is there stays."""
    from benchmarks.compress_quantize import put_in_another_order
    from deepseek import hub
    from examples import smollm2_ft

    folder.mkdir(parents=True, exist_ok=True)
    tuned, text = folder / "tuned", folder / "docstrings.txt"
    if not text.is_file():
        text.write_text(smollm2_ft.docstrings(), encoding="utf-8")
        settings = folder / "run.yaml"
        settings.write_text(RUN.replace("TEXT", str(text.resolve())), encoding="utf-8")
    if not tuned_of(folder).is_dir():
        _deepseek("train", folder / "run.yaml", "--out", tuned)
    if not (folder / "int8").is_dir():
        _deepseek("compress", model, "--to", "int8", "--no-gates", "--out", folder / "int8")
    for source, name in ((model, "base"), (tuned_of(folder), "tuned")):
        if not (folder / "permuted" / name).is_dir():
            loaded = hub.load(source, dtype="float32")
            put_in_another_order(loaded)  # type: ignore[arg-type]
            hub.save(loaded, folder / "permuted" / name)
    if not (folder / "int4").is_dir():
        words = ("--to", "int4", "--method", "gptq", "--samples", "8", "--no-gates")
        _deepseek("compress", folder / "permuted" / "base", *words, "--out", folder / "int4")


def tuned_of(folder: Path) -> Path:
    """Return the fine-tuned model."""
    return folder / "tuned" / "stages" / "finetuned"


def old_of(folder: Path, case: str) -> Path:
    """Return the bundle that packages are applied to."""
    return folder / case / "stages" / "1-quantize"


def packages(folder: Path, case: str, model: str, tokens: int, all_ways: bool) -> Iterator[Row]:
    """Make the packages of one grid, and yield what each takes."""
    is_permuted = case == "int4"
    tuned = folder / "permuted" / "tuned" if is_permuted else tuned_of(folder)
    before = str(folder / "permuted" / "base") if is_permuted else model
    ways: dict[str, tuple[float, str | None]] = {"nearest": (0.0, None)}
    if is_permuted:  # codes of int8 are the nearest of what they were made of
        ways |= {"moved": (0.0, before)}
    if all_ways:
        ways |= {f"nearest, margin {margin}": (margin, None) for margin in (0.1, 0.25, 0.5)}
    for way, (margin, first) in ways.items():
        new = folder / "new" / f"{case}-{way.replace(' ', '-')}"
        done = on_grid_of(
            old_of(folder, case), tuned, new, before=first, margin=margin, price_tokens=tokens
        )
        package = package_of(folder, case, way)
        made = make_delta(old_of(folder, case), new, package, folder / "key")
        figures = {item.name: item.value for item in done.measurements[:2]}
        divergences = [item.value for item in done.measurements[2:]]
        yield Row(
            case,
            way,
            figures["changed_codes"],
            figures["clipped_weights"],
            made.package_bytes,
            made.share,
            made.entropy_bytes / made.bundle_bytes,
            *(divergences or [None, None]),
        )


def package_of(folder: Path, case: str, way: str) -> Path:
    """Return where a package goes."""
    return folder / f"{case}-{way.replace(' ', '-')}.delta"


def peers(old: Path, new: Path) -> Iterator[tuple[str, str, float, float]]:
    """Yield what others make of the weights' files: name, of what, share, seconds."""
    whole = [(each / "model.safetensors").read_bytes() for each in (old, new)]
    start = len(whole[0]) // 2
    excerpt = [each[start : start + EXCERPT_BYTES] for each in whole]
    contests: list[tuple[str, str, str, Callable[[bytes, bytes], int]]] = [
        ("lzma of the new file", "lzma", "excerpt", lambda old, new: len(lzma.compress(new))),
        ("zstd 19 of the new file", "zstandard", "excerpt", _zstd),
        ("zstd 19 --patch-from", "zstandard", "excerpt", _zstd_patch),
        ("bsdiff", "bsdiff4", "excerpt", _bsdiff),
        ("hdiffpatch", "detools", "excerpt", _detools),
        ("zstd 3 --patch-from", "zstandard", "whole", _zstd_patch_fast),
    ]
    for name, package, what, run in contests:
        try:
            importlib.import_module(package)
        except ImportError:
            yield f"{name} (not installed)", what, float("nan"), float("nan")
            continue
        first, second = whole if what == "whole" else excerpt
        begun = time.perf_counter()
        size = run(first, second)
        yield name, what, size / len(second), time.perf_counter() - begun


def _zstd(old: bytes, new: bytes) -> int:
    zstd = importlib.import_module("zstandard")
    return len(zstd.ZstdCompressor(level=19).compress(new))


def _zstd_patch(old: bytes, new: bytes, level: int = 19) -> int:
    zstd = importlib.import_module("zstandard")
    settings = zstd.ZstdCompressionParameters.from_level(
        level, window_log=28, enable_ldm=True, source_size=len(new), dict_size=len(old)
    )
    content = zstd.ZstdCompressionDict(old, dict_type=zstd.DICT_TYPE_RAWCONTENT)
    return len(zstd.ZstdCompressor(dict_data=content, compression_params=settings).compress(new))


def _zstd_patch_fast(old: bytes, new: bytes) -> int:
    return _zstd_patch(old, new, 3)


def _bsdiff(old: bytes, new: bytes) -> int:
    return len(importlib.import_module("bsdiff4").diff(old, new))


def _detools(old: bytes, new: bytes) -> int:
    import io

    patch = io.BytesIO()
    settings = {"algorithm": "hdiffpatch", "patch_type": "hdiffpatch", "compression": "lzma"}
    detools = importlib.import_module("detools")
    detools.create_patch(io.BytesIO(old), io.BytesIO(new), patch, **settings)
    return len(patch.getvalue())


def applying(package: Path, old: Path, trust: Path, rounds: int) -> list[tuple[int, int, float]]:
    """Apply a package in fresh processes: peak bytes before and behind, and seconds, of each."""
    found = []
    device = package.with_name("device")
    for _ in range(rounds):
        shutil.rmtree(device, ignore_errors=True)
        shutil.copytree(old, device)
        command = [sys.executable, "-c", APPLY, package, device, trust]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        first, second, seconds = done.stdout.split()[1:]
        found.append((int(first), int(second), float(seconds)))
    return found


def cuts(package: Path, old: Path, new: Path, trust: Path, count: int, longest: float) -> list[int]:
    """Kill processes that apply a package, at random moments.

    Returns:
        How many were killed, how many left the old version, and how many the new one.

    Raises:
        AssertionError: a bundle was neither.
    """
    device = package.with_name("device")
    shutil.rmtree(device, ignore_errors=True)
    shutil.copytree(old, device)
    hashes = [Bundle.open(each).content_hash for each in (old, new)]
    found, randomly = [0, 0, 0], random.Random(0)
    for _ in range(count):
        command = [sys.executable, "-c", APPLY, package, device, trust]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(randomly.uniform(0, longest))
        process.kill()
        found[0] += process.wait() != 0
        process.stdout.close()
        left = hashes.index(Bundle.open(device, verify=True).content_hash)
        found[1 + left] += 1
        if left == 1:
            assert rollback(device).content_hash == hashes[0]
    command = [sys.executable, "-c", APPLY, package, device, trust]
    subprocess.run(command, capture_output=True, check=True)
    assert Bundle.open(device, verify=True).content_hash == hashes[1]
    return found


def _deepseek(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "deepseek", *map(str, words)], check=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="what is measured, and where packages go")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prepare", action="store_true", help="make what is measured, and end")
    parser.add_argument("--cases", nargs="+", default=["int8", "int4"], choices=("int8", "int4"))
    parser.add_argument("--margins", action="store_true", help="other ways to re-round too")
    parser.add_argument("--tokens", type=int, default=2048, help="of the divergence; 0: none")
    parser.add_argument("--rounds", type=int, default=3, help="of applying")
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    folder, console = options.folder, Console()
    if options.prepare:
        prepare(folder, options.model)
        return
    if not (folder / "key").is_file():
        make_keys(folder / "key")
    for case in options.cases:
        found = packages(folder, case, options.model, options.tokens, options.margins)
        console.print(_table(list(found)))
        old, new, package = old_of(folder, case), folder / "new" / f"{case}-nearest", "nearest"
        place, trust = package_of(folder, case, package), folder / "key.pub"
        if not options.no_peers:
            for name, what, share, seconds in peers(old, new):
                console.print(f"{case} {what}: {name}: {100 * share:.2f} %, {seconds:.1f} s")
        times = applying(place, old, trust, options.rounds)
        console.print(f"{case}: applied in {sorted(round(each[2], 2) for each in times)} s")
        first, second = max(times, key=lambda each: each[1] - each[0])[:2]
        console.print(f"{case}: peak {second / 1e6:.1f} MB, of which {first / 1e6:.1f} before")
        if options.cuts:
            longest = 1.2 * min(each[2] for each in times)
            killed, left_old, left_new = cuts(place, old, new, trust, options.cuts, longest)
            words = f"{killed} killed of {options.cuts}; old {left_old}, new {left_new}, lost 0"
            console.print(f"{case}: {words}")


def _table(rows: list[Row]) -> Table:
    columns = [field.name for field in dataclasses.fields(Row)]
    table = Table(*columns, box=None)
    for row in rows:
        values = json.loads(json.dumps(dataclasses.astuple(row)))
        table.add_row(*(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values))
    return table


if __name__ == "__main__":
    main()

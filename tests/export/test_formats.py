"""The room's core: what an export leaves behind, when it is refused, and what a stranger adds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek import hub
from deepseek.errors import ConfigError, DeepseekError, FormatError
from deepseek.export import FORMATS, Exported, Format, Reader, export, known_formats, open_exported
from deepseek.export.manifest import MANIFEST, Manifest
from tests.hub.tiny import tiny_decoder, tiny_tokenizer


class Doubles:
    """A runtime that answers twice the ids."""

    name, kind, max_tokens, max_batch, has_cache = "doubles 1.0", "decoder", 8, 2, False

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.folder, self.threads = folder, threads

    def forward(self, ids: Any, mask: Any) -> Any:
        return (2 * ids * mask).astype(np.float32)


def write(bundle: hub.Bundle, folder: Path, *, size: int = 100, fails: bool = False) -> Exported:
    (folder / "a.doubles").write_bytes(b"x" * size)
    if fails:
        raise ConfigError("no such luck")
    return Exported("doubles", folder, (folder / "a.doubles",), ("all was doubled",))


DOUBLES = Format(
    "doubles",
    "a test",
    writer=f"{__name__}:write",
    reader=f"{__name__}:Doubles",
    kinds=frozenset({"decoder"}),
    options=frozenset({"size", "fails"}),
    suffix=".doubles",
)


@pytest.fixture(autouse=True)
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this module findable by name, and its format an entry point of a package."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    point = EntryPoint("doubles", f"{__name__}:DOUBLES", "deepseek.formats")
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda group: [point] if group == "deepseek.formats" else [],
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    model = tiny_decoder(vocab_size=330)
    model.tokenizer = tiny_tokenizer()
    hub.save(model, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_strangers_format_is_written_and_read(bundle: Path, tmp_path: Path) -> None:
    assert [*known_formats()] == [*FORMATS, "doubles"]
    made = export(bundle, "doubles", tmp_path / "out", size=7)
    assert made.files == (tmp_path / "out" / "a.doubles",)
    assert made.folder == tmp_path / "out"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    reader: Reader = open_exported(tmp_path / "out", threads=3)
    assert isinstance(reader, Doubles)
    assert (reader.folder, reader.threads) == (tmp_path / "out", 3)
    assert isinstance(open_exported(tmp_path / "out" / "a.doubles"), Doubles)


def test_the_manifest_says_what_it_is_and_of_what(bundle: Path, tmp_path: Path) -> None:
    export(bundle, "doubles", tmp_path / "out", size=7)
    found, source = Manifest.read(tmp_path / "out"), hub.Bundle.open(bundle)
    assert (found.format, found.kind, found.options) == ("doubles", "decoder", {"size": 7})
    assert (found.source, found.source_hash) == (source.card.name, source.content_hash)
    assert set(found.source_files) == set(source.card.files)
    assert found.notes == ("all was doubled",)
    assert set(found.files) == {
        path.name for path in (tmp_path / "out").iterdir() if path.name != MANIFEST
    }


def test_a_folder_without_a_card_has_hashes_too(bundle: Path, tmp_path: Path) -> None:
    with_card = hub.Bundle.open(bundle).content_hash
    (bundle / "bundle.json").unlink()
    export(bundle, "doubles", tmp_path / "out")
    found = Manifest.read(tmp_path / "out")
    assert found.source_hash == with_card
    assert all(len(sha256) == 64 for sha256 in found.source_files.values())


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flipped, cut, Path.unlink])
@pytest.mark.parametrize("name", ["a.doubles", "tokenizer.json"])
def test_damage_to_any_file_is_one_line(
    bundle: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    export(bundle, "doubles", tmp_path / "out")
    damage(tmp_path / "out" / name)
    with pytest.raises(FormatError, match="export the model again") as caught:
        open_exported(tmp_path / "out")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_manifest_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = {
        "version": 1,
        "format": "doubles",
        "kind": "decoder",
        "source": "a",
        "source_hash": "sha256:0",
        "source_files": {"a": "0"},
        "options": {},
        "notes": ["a"],
        "versions": {},
        "files": {},
    }
    odd = st.sampled_from([None, 3, "a", [1], {"a": 1}, {"../a": {}}, {"a": {"sha256": "0"}}])
    content: Any = dict(whole)
    for name in data.draw(st.sets(st.sampled_from([*whole, "more"]))):
        if data.draw(st.booleans()):
            content.pop(name, None)
        else:
            content[name] = data.draw(odd)
    text = json.dumps(content)
    text = text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text
    (tmp_path / MANIFEST).write_text(text)
    try:
        Manifest.read(tmp_path).check(tmp_path)
    except FormatError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname"])
def test_a_manifest_does_not_lead_out_of_its_folder(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    export(bundle, "doubles", tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    content["files"][name] = content["files"]["a.doubles"]
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="in the folder"):
        open_exported(tmp_path / "out")


def test_a_failure_leaves_what_was_there(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="luck"):
        export(bundle, "doubles", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()
    export(bundle, "doubles", tmp_path / "out", size=5)
    with pytest.raises(ConfigError, match="luck"):
        export(bundle, "doubles", tmp_path / "out", fails=True)
    assert (tmp_path / "out" / "a.doubles").stat().st_size == 5
    export(bundle, "doubles", tmp_path / "out", size=6)
    assert (tmp_path / "out" / "a.doubles").stat().st_size == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_something_else_is_not_replaced(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="another folder"):
        export(bundle, "doubles", tmp_path / "mine")
    with pytest.raises(ConfigError, match="folder"):
        export(bundle, "doubles", tmp_path / "mine" / "letter.txt")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "onx"}, "--formats"),
    "option": ({"sise": 3}, "fails, size"),
    "no model": ({"source": "nowhere-1b"}, "model"),
    "no name": ({"source": ""}, "model"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(bundle: Path, tmp_path: Path, case: str) -> None:
    changes, match = MISTAKES[case]
    arguments = {"source": bundle, "format": "doubles", "folder": tmp_path / "out", **changes}
    with pytest.raises(ConfigError, match=match) as caught:
        export(**arguments)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_back_says_so(bundle: Path, tmp_path: Path) -> None:
    export(bundle, "gguf", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"llama\.cpp"):
        open_exported(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"llama\.cpp"):
        open_exported(tmp_path / "out" / "model.gguf")
    with pytest.raises(DeepseekError, match="there"):
        open_exported(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="export"):
        open_exported(bundle)


def test_a_gguf_file_is_pulled_first(bundle: Path, tmp_path: Path) -> None:
    export(bundle, "gguf", tmp_path / "out")
    with pytest.raises(ConfigError, match="deepseek pull"):
        export(tmp_path / "out" / "model.gguf", "doubles", tmp_path / "again")


def test_the_room_loads_no_torch() -> None:
    code = (
        "import sys, deepseek.export as room, deepseek.cli.verbs.export\n"
        "room.known_formats(), room.Format\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_absent_packages_are_one_line(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['onnx'] = sys.modules['onnxruntime'] = None\n"
        "from deepseek.cli.main import main\n"
        f"sys.exit(main(['export', {str(bundle)!r}, '--format', 'onnx', '--out', 'out']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert 'pip install "deepseek-stack[export]"' in done.stderr
    assert not (tmp_path / "out").exists()

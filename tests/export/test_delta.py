"""Delta packages: what is applied is what was made, bit for bit; and what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek import hub
from deepseek.cli.main import main
from deepseek.errors import CapacityError, ConfigError, DeepseekError, FormatError, VerifyError
from deepseek.export.delta import (
    align,
    apply_delta,
    applying,
    forget,
    make_delta,
    make_keys,
    rollback,
    verify_delta,
)
from deepseek.hub import Bundle
from tests.export.delta_bundles import INT4, INT8, Case, contents, make_case, signed_again
from tests.hub.tiny import tiny_decoder


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("delta"))


@pytest.fixture
def device(case: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case.old, tmp_path / "device"))


@pytest.mark.parametrize(
    "kinds,extra",
    [
        (INT8, {}),
        (INT8, {"max_shard_bytes": 30_000}),
        (INT4, {}),
        ({"proj": (4, 32, True)}, {"layout": "gptq"}),
        ({"mlp": (8, 32, False), "": (8, 64, True, True)}, {}),
    ],
    ids=["int8", "shards", "int4", "gptq", "mixed"],
)
def test_the_result_is_the_new_bundle(tmp_path: Path, kinds: Any, extra: Any) -> None:
    case = make_case(tmp_path, kinds, **extra)
    old, new = Bundle.open(case.old), Bundle.open(case.new)
    checked = verify_delta(case.package, case.trust, case.old)
    assert checked.is_applied and checked.target_hash == new.content_hash
    (case.old / "mine.txt").write_text("mine")
    done = apply_delta(case.package, case.old, case.trust)
    assert done.is_changed
    found = Bundle.open(case.old, verify=True)
    assert found.content_hash == new.content_hash
    assert contents(case.old) == {**contents(case.new), "mine.txt": contents(case.old)["mine.txt"]}
    parents = [parent.content_hash for parent in found.card.parents]
    assert parents == [old.content_hash, checked.package]
    assert found.card.stage is not None and found.card.stage.name == "delta"
    assert found.card.stage.settings["signed_by"] == checked.signed_by
    assert hub.load(case.old).bundle.content_hash == new.content_hash


def test_codes_that_step_cost_little(case: Case) -> None:
    made = make_delta(case.old, case.new, case.package, case.key)
    assert made.package_bytes == case.package.stat().st_size
    assert made.bytes_by_kind["bytes"] < 1.3 * made.entropy_bytes + 20 * 100
    assert made.bytes_by_kind["copy"] == 0
    names = [item.name for item in made.measurements]
    assert names == ["package_bytes", "package_share", "code_entropy_share"]


def test_a_package_is_the_same_when_it_is_made_again(case: Case, tmp_path: Path) -> None:
    make_delta(case.old, case.new, tmp_path / "again", case.key)
    assert (tmp_path / "again").read_bytes() == case.package.read_bytes()


def test_files_come_and_go_and_change(case: Case, tmp_path: Path) -> None:
    old, new = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (case.old, case.new))
    for folder in (old, new):
        (folder / "bundle.json").unlink()
    (old / "gone.txt").write_text("gone")
    (new / "deep" / "er").mkdir(parents=True)
    (new / "deep" / "er" / "new.bin").write_bytes(os.urandom(3000))
    (new / "empty").write_bytes(b"")
    lines = [f"line {number} of a file\n" for number in range(2000)]
    (old / "lines.txt").write_text("".join(lines))
    (new / "lines.txt").write_text("".join([*lines[:900], "another\n", *lines[950:], "end"]))
    made = make_delta(old, new, tmp_path / "package", case.key)
    assert made.bytes_by_kind["literal"] < 5000
    apply_delta(tmp_path / "package", old, case.trust)
    assert contents(old) == contents(new)
    rollback(old)
    assert (old / "gone.txt").read_text() == "gone" and not (old / "deep").exists()


@given(st.lists(st.sampled_from([b"a" * 300 + b"\n", b"b\n", b"c" * 100 + b"\n", b"d"])), st.data())
def test_runs_of_lines_make_the_new_file(lines: list[bytes], data: st.DataObject) -> None:
    old = b"".join(lines)
    new = b"".join(data.draw(st.lists(st.sampled_from([*lines, b"x\n"]))))
    made, at = b"", 0
    for span in align._runs(old, new, "f"):
        source, start = (old, span.offset) if span.source else (new, at)
        made += source[start : start + span.length]
        at += span.length
    assert made == new


def test_again_is_nothing_to_do(case: Case, device: Path) -> None:
    apply_delta(case.package, device, case.trust)
    before = device.stat().st_ino
    assert not apply_delta(case.package, device, case.trust).is_changed
    assert device.stat().st_ino == before


def test_back_and_forth(case: Case, device: Path) -> None:
    was = contents(device, but=())
    apply_delta(case.package, device, case.trust)
    (device / "mine.txt").write_text("mine")
    assert rollback(device).content_hash == Bundle.open(case.old).content_hash
    (device / "mine.txt").unlink()
    assert contents(device, but=()) == was
    with pytest.raises(ConfigError, match="made by a delta package"):
        rollback(device)
    apply_delta(case.package, device, case.trust)
    assert [path.name[:15] for path in device.parent.iterdir() if path.name[0] == "."] == [
        ".device.before-"
    ]
    forget(device)
    assert [path.name for path in device.parent.iterdir()] == ["device"]
    with pytest.raises(ConfigError, match="kept beside"):
        rollback(device)


def test_versions_follow_one_another(case: Case, device: Path, tmp_path: Path) -> None:
    make_delta(case.new, case.old, tmp_path / "next", case.key)
    apply_delta(case.package, device, case.trust)
    apply_delta(tmp_path / "next", device, case.trust)
    assert contents(device) == contents(case.old)
    kept = [path for path in tmp_path.iterdir() if ".before-" in path.name]
    assert len(kept) == 1
    assert contents(kept[0]) == contents(case.new)
    assert rollback(device).content_hash == Bundle.open(case.new).content_hash


def test_without_rollback_nothing_is_kept(case: Case, device: Path, tmp_path: Path) -> None:
    apply_delta(case.package, device, case.trust, keeps_before=False)
    assert [path.name for path in tmp_path.iterdir()] == ["device"]


def test_a_damaged_version_before_is_no_way_back(case: Case, device: Path) -> None:
    apply_delta(case.package, device, case.trust)
    kept = next(path for path in device.parent.iterdir() if path.name[0] == ".")
    weights = kept / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FormatError):
        rollback(device)
    assert contents(device) == contents(case.new)


def test_weights_that_no_card_names_do_not_stay(case: Case, device: Path) -> None:
    (device / "model-00001-of-00002.safetensors").write_bytes(b"other weights")
    apply_delta(case.package, device, case.trust)
    assert contents(device) == contents(case.new)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_another_base_is_refused(case: Case, device: Path, name: str, fault: str) -> None:
    (device / "bundle.json").unlink()
    path = device / name
    data = path.read_bytes()
    path.unlink()
    if fault == "changed":
        path.write_bytes(
            data.replace(b"e", b"f") if name != "model.safetensors" else data[:-1] + b"!"
        )
    with pytest.raises((ConfigError, FormatError)):
        apply_delta(case.package, device, case.trust)
    with pytest.raises(DeepseekError):
        verify_delta(case.package, case.trust, device)
    assert [each.name for each in device.parent.iterdir()] == ["device"]


def test_another_key_is_refused(case: Case, device: Path, tmp_path: Path) -> None:
    _, other = make_keys(tmp_path / "other")
    for call in (verify_delta, lambda path, key: apply_delta(path, device, key)):
        with pytest.raises(VerifyError, match="trusted key"):
            call(case.package, other)
    assert contents(device) == contents(case.old)


def test_an_unsigned_package_is_refused(case: Case, tmp_path: Path) -> None:
    data = bytearray(case.package.read_bytes())
    start = 12 + int.from_bytes(data[8:12], "little") + 32
    data[start : start + 64] = bytes(64)
    (tmp_path / "unsigned").write_bytes(data)
    with pytest.raises(VerifyError, match="unsigned"):
        verify_delta(tmp_path / "unsigned", case.trust)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_byte_anywhere_is_refused(case: Case, data: st.DataObject) -> None:
    whole = bytearray(case.package.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path = case.package.with_name("tampered")
    path.write_bytes(whole)
    with pytest.raises((VerifyError, FormatError)):
        verify_delta(path, case.trust)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_or_longer_package_is_refused(case: Case, data: st.DataObject) -> None:
    whole = case.package.read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    path = case.package.with_name("cut")
    for content in (whole[:length], whole + whole[: length + 1]):
        path.write_bytes(content)
        with pytest.raises((VerifyError, FormatError)):
            verify_delta(path, case.trust)


NAMES = ["../out", "/etc/x", "a/../../b", "a//b", ".", "c:\\x", "bundle.json", "a\0b", "\ud800"]


def renamed(name: str) -> Any:
    def change(manifest: dict[str, Any]) -> None:
        files, recipes = manifest["card"]["files"], manifest["recipes"]
        files[name] = files.pop("model.safetensors")
        recipes[name] = recipes.pop("model.safetensors")

    return change


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_are_refused(
    case: Case, device: Path, tmp_path: Path, name: str
) -> None:
    path = signed_again(case, tmp_path / "package", renamed(name))
    with pytest.raises(FormatError):
        apply_delta(path, device, case.trust)
    assert contents(device) == contents(case.old)


def set_chunk(place: int, value: object) -> Any:
    def change(manifest: dict[str, Any]) -> None:
        rows = manifest["recipes"]["model.safetensors"]
        next(row for row in rows if row[0] == "bytes")[place] = value

    return change


WRONG = {
    "kind": set_chunk(0, "pickle"),
    "source": set_chunk(1, 99),
    "negative source": set_chunk(1, -1),
    "offset": set_chunk(2, 1 << 40),
    "negative offset": set_chunk(2, -5),
    "long": set_chunk(3, 1 << 30),
    "empty": set_chunk(3, 0),
    "no number": set_chunk(3, True),
    "payload": set_chunk(4, 1 << 30),
    "hash": set_chunk(5, "00"),
    "version": lambda manifest: manifest.update(format_version=2),
    "card": lambda manifest: manifest.update(card=[]),
    "no recipes": lambda manifest: manifest.update(recipes={}),
    "no base": lambda manifest: manifest.pop("base"),
    "size": lambda manifest: manifest["card"]["files"]["config.json"].update(size_bytes=1.5),
    "file in a file": lambda manifest: manifest["base"]["files"].update(
        {"config.json/x": manifest["base"]["files"]["config.json"]}
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_cannot_be_is_refused_though_it_is_signed(
    case: Case, device: Path, tmp_path: Path, fault: str
) -> None:
    path = signed_again(case, tmp_path / "package", WRONG[fault])
    with pytest.raises((FormatError, VerifyError)):
        apply_delta(path, device, case.trust)
    assert contents(device) == contents(case.old)
    assert [each.name for each in tmp_path.iterdir() if each.name[0] == "."] == []


def test_a_file_that_comes_out_wrong_is_refused(case: Case, device: Path, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["card"]["files"]["model.safetensors"]["sha256"] = "0" * 64

    path = signed_again(case, tmp_path / "package", change)
    with pytest.raises(VerifyError, match=r"model\.safetensors"):
        apply_delta(path, device, case.trust, keeps_before=False)
    assert contents(device) == contents(case.old)


def test_a_full_disk_is_seen_before_anything_is_written(
    case: Case, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(applying.os, "statvfs", lambda path: Full)
    with pytest.raises(CapacityError, match="12288 bytes free"):
        apply_delta(case.package, device, case.trust)
    assert [each.name for each in device.parent.iterdir()] == ["device"]


LIMITED = """
import resource, sys
from deepseek.errors import CapacityError
from deepseek.export.delta import apply_delta, make_delta
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    if sys.argv[1] == "apply":
        apply_delta(*sys.argv[2:])
    else:
        make_delta(*sys.argv[2:])
except CapacityError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["apply", "make"])
def test_a_disk_that_fills_on_the_way_changes_nothing(
    case: Case, device: Path, tmp_path: Path, what: str
) -> None:
    package = tmp_path / "package"
    words = {
        "apply": [case.package, device, case.trust],
        "make": [case.old, case.new, package, case.key],
    }[what]
    if what == "make":
        (case.new / "noise.bin").write_bytes(os.urandom(60_000))
        (case.new / "bundle.json").rename(case.new / ".card")
    command = [sys.executable, "-c", LIMITED, what, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if what == "make":
        (case.new / "noise.bin").unlink()
        (case.new / ".card").rename(case.new / "bundle.json")
    assert done.returncode == 0 and "must be large enough" in done.stdout, done.stderr
    assert contents(device) == contents(case.old)
    assert not package.exists()
    assert not [each for each in tmp_path.iterdir() if ".new-" in each.name]


def test_the_limit_of_files_is_not_left_behind() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] in (resource.RLIM_INFINITY, -1)


def test_equal_bundles_have_no_delta(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another version"):
        make_delta(case.old, case.old, tmp_path / "package", case.key)


@pytest.mark.parametrize("content", [b"", b"not a package at all", b"DSDELTA\x02" + bytes(200)])
def test_other_files_are_no_packages(case: Case, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FormatError, match="a delta package"):
        verify_delta(tmp_path / "file", case.trust)
    with pytest.raises(ConfigError, match="a file"):
        verify_delta(tmp_path / "none", case.trust)


def test_keys(case: Case, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path / "key")
    assert private.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="a new file"):
        make_keys(private)
    with pytest.raises(FormatError, match="private key"):
        make_delta(case.old, case.new, tmp_path / "package", public)
    with pytest.raises(FormatError, match="public key"):
        verify_delta(case.package, private)
    with pytest.raises(ConfigError, match="deepseek delta key"):
        verify_delta(case.package, tmp_path / "none")


def test_openssl_knows_the_keys(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    private, public = make_keys(tmp_path / "key")
    command = ["openssl", "pkey", "-in", str(private), "-pubout"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == public.read_text()


def test_the_command_line(
    case: Case, device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object, code: int = 0) -> dict[str, Any]:
        assert main(["delta", *map(str, words), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    run("key", tmp_path / "key")
    package, trust = tmp_path / "package", tmp_path / "key.pub"
    made = run("make", case.old, case.new, "--out", package, "--key", tmp_path / "key")
    assert made["bytes"] == package.stat().st_size
    assert made["measurements"][0]["name"] == "package_bytes"
    checked = run("verify", package, "--trust", trust, "--base", device)
    done = run("apply", package, "--to", device, "--trust", trust)
    assert done["changed"] and done["content_hash"] == checked["target_hash"]
    assert run("rollback", device)["content_hash"] == checked["base_hash"]
    run("apply", package, "--to", device, "--trust", trust)
    run("forget", device)
    assert "error" in run("rollback", device, code=2)
    package.write_bytes(package.read_bytes()[:-1] + b"?")
    assert run("verify", package, "--trust", trust, code=1)["error"]["kind"] == "VerifyError"
    margin = ["--margin", 0.1]
    run("make", case.old, case.new, "--out", package, "--key", tmp_path / "key", *margin, code=2)


def test_nothing_here_loads_torch(case: Case, device: Path) -> None:
    code = (
        "import sys\nfrom deepseek.export.delta import apply_delta, rollback, verify_delta\n"
        "verify_delta(*sys.argv[1:3])\napply_delta(sys.argv[1], sys.argv[3], sys.argv[2])\n"
        "rollback(sys.argv[3])\nassert 'torch' not in sys.modules"
    )
    words = [str(case.package), str(case.trust), str(device)]
    subprocess.run([sys.executable, "-c", code, *words], check=True)


def test_without_cryptography_the_extra_is_named(case: Case) -> None:
    code = (
        "import sys\nsys.modules['cryptography'] = None\n"
        "from deepseek.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = ["delta", "verify", str(case.package), "--trust", str(case.trust)]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'deepseek-stack[delta]"' in done.stderr


def test_a_bundle_in_floats_is_no_error(tmp_path: Path) -> None:
    for seed in range(2):
        hub.save(tiny_decoder(seed=seed), tmp_path / str(seed))
    key, trust = make_keys(tmp_path / "key")
    make_delta(tmp_path / "0", tmp_path / "1", tmp_path / "package", key)
    apply_delta(tmp_path / "package", tmp_path / "0", trust)
    assert contents(tmp_path / "0") == contents(tmp_path / "1")

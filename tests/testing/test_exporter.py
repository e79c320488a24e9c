"""The contract of an exporter: ours hold it, and every planted fault is caught."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek import hub
from deepseek.errors import ConfigError, ShapeError, VerifyError
from deepseek.export import FORMATS, Exported, Format
from deepseek.models import Decoder
from deepseek.testing import check_exporter

SMALL = ("decoder", "a window", "experts", "encoder", "classifier")


class Stranger:
    """A format that keeps the model as a bundle and runs it by its own modules; with a place for
    one fault."""

    reports = True

    @classmethod
    def write(cls, bundle: hub.Bundle, folder: Path, *, progress: Any = None) -> Exported:
        model = hub.load(bundle.path)
        cls.check(model)
        with tempfile.TemporaryDirectory() as place:
            hub.save(model, Path(place) / "kept")
            shutil.copytree(Path(place) / "kept", folder / "kept")
        if progress is not None:
            progress("keeping", 0.5)
        return Exported("stranger", folder, cls.files(bundle, folder))

    @classmethod
    def check(cls, model: Any) -> None:
        if isinstance(model, Decoder) and model.config.experts is not None:
            raise ConfigError("experts are not held")

    @classmethod
    def files(cls, bundle: hub.Bundle, folder: Path) -> tuple[Path, ...]:
        return tuple(path for path in (folder / "kept").rglob("*") if path.is_file())

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: Any = hub.load(self.place())
        self.name, self.max_batch = "stranger 1.0", 4
        self.max_tokens = self.model.config.max_positions
        self.has_cache = isinstance(self.model, Decoder)
        labels = () if self.has_cache else self.model.config.labels
        self.kind = "decoder" if self.has_cache else "classifier" if labels else "encoder"

    def place(self) -> Path:
        return self.folder / "kept"

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if ids.shape[1] > self.max_tokens:
            raise ShapeError("too long")
        with torch.inference_mode():
            said = self.model(torch.from_numpy(ids), torch.from_numpy(mask))
        return (said.last_hidden_state if self.kind == "encoder" else said.logits).numpy()

    def step(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        whole = ids if state is None else np.concatenate([state, ids], 1)
        return self.forward(whole, np.ones_like(whole))[:, -ids.shape[1] :], whole

    def layers(self, ids: np.ndarray, mask: np.ndarray) -> Sequence[np.ndarray] | None:
        with torch.inference_mode():
            said = self.model(torch.from_numpy(ids), output_hidden_states=True)
        return [each.numpy() for each in said.hidden_states[1:]]


def made(exporter: type[Stranger], monkeypatch: pytest.MonkeyPatch) -> Format:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "chosen", exporter, raising=False)
    return Format(
        "stranger",
        "a test",
        writer=f"{__name__}:write",
        reader=f"{__name__}:read",
        reports=exporter.reports,
    )


chosen = Stranger


def write(bundle: hub.Bundle, folder: Path, **options: Any) -> Exported:
    return chosen.write(bundle, folder, **options)


def read(folder: Path) -> Stranger:
    return chosen(folder)


def test_a_strangers_exporter_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = check_exporter(made(Stranger, monkeypatch))
    assert proof.refused == ("experts",)
    assert {"decoder", "encoder", "classifier", "ALiBi", "latent attention"} < set(proof.served)
    assert proof.has_cache
    assert proof.has_layers
    assert proof.largest_error < 1e-5
    assert proof.text.startswith("stranger: 12 models written, 1 refused")


@pytest.mark.parametrize("name", ["openvino", "onnx", "triton", "tensorrt"])
def test_our_formats_hold_it(name: str) -> None:
    pytest.importorskip("onnx" if name != "openvino" else "openvino", reason=f"for {name}")
    proof = check_exporter(FORMATS[name], models=SMALL)
    assert proof.refused == ("experts",)
    assert proof.is_read == (FORMATS[name].reader is not None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torch", "executorch"])
def test_our_compiled_formats_hold_it(name: str) -> None:
    pytest.importorskip(FORMATS[name].packages[0], reason=f"for {name}")
    options = {} if name == "torch" else {"max_batch": 3, "max_tokens": 48}
    proof = check_exporter(FORMATS[name], models=("decoder", "encoder", "experts"), **options)
    assert proof.refused == ("experts",)
    assert proof.has_cache


def test_the_kinds_that_are_named_are_all_that_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert check_exporter(FORMATS["gguf"], models=("encoder", "biases")).served == ("biases",)


class LeftMask(Stranger):
    """Padding on the left is taken for text."""

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen = np.maximum.accumulate(mask[:, ::-1], 1)[:, ::-1].copy()
        return super().forward(ids, seen)


class RightMask(Stranger):
    """Padding on the right is taken for text; only an encoder can tell."""

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return super().forward(ids, np.maximum.accumulate(mask, 1))


class OffByOne(Stranger):
    """The first token is not seen once there are several."""

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen = mask.copy()
        seen[:, 0] *= ids.shape[1] == 1
        return super().forward(ids, seen)


class Scaled(Stranger):
    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return super().forward(ids, mask) * np.float32(1.001)


class Doubles(Stranger):
    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return super().forward(ids, mask).astype(np.float64)


class OneRow(Stranger):
    """All rows get the first one's answer."""

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        found = super().forward(ids, mask)
        return np.broadcast_to(found[:1], found.shape).copy()


class NotANumber(Stranger):
    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        found = super().forward(ids, mask)
        found[..., 0] = np.nan
        return found


class AnyLength(Stranger):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model.config = self.model.config.replace(max_positions=10**6)

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        kept, self.max_tokens = self.max_tokens, 10**6
        found = super().forward(ids, mask)
        self.max_tokens = kept
        return found


class Scribbles(Stranger):
    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        found = super().forward(ids, mask)
        ids[:] = 0
        return found


class OneState(Stranger):
    """The state is one list, which every step goes on writing to."""

    def step(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        state = [] if state is None else state
        state.append(ids)
        whole = np.concatenate(state, 1)
        return self.forward(whole, np.ones_like(whole))[:, -ids.shape[1] :], state


class Forgets(Stranger):
    def step(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        found, _ = super().step(ids, state)
        return found, ids


class LayersOfEmbedding(Stranger):
    def layers(self, ids: np.ndarray, mask: np.ndarray) -> Sequence[np.ndarray] | None:
        with torch.inference_mode():
            said = self.model(torch.from_numpy(ids), output_hidden_states=True)
        return [each.numpy() for each in said.hidden_states[:-1]]


class WrongKind(Stranger):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kind = "encoder"


class NeedsTheSource(Stranger):
    @classmethod
    def files(cls, bundle: hub.Bundle, folder: Path) -> tuple[Path, ...]:
        (folder / "where").write_text(json.dumps(str(bundle.path)))
        return (folder / "where",)

    def place(self) -> Path:
        return Path(json.loads((self.folder / "where").read_text()))


class Linked(Stranger):
    @classmethod
    def files(cls, bundle: hub.Bundle, folder: Path) -> tuple[Path, ...]:
        os.symlink(bundle.path / "config.json", folder / "linked.json")
        return (folder / "linked.json",)


class Elsewhere(Stranger):
    @classmethod
    def files(cls, bundle: hub.Bundle, folder: Path) -> tuple[Path, ...]:
        (folder.parent / "beside").write_text("stray")
        return super().files(bundle, folder)


class WritesToTheSource(Stranger):
    @classmethod
    def files(cls, bundle: hub.Bundle, folder: Path) -> tuple[Path, ...]:
        (bundle.path / "note.txt").write_text("was here")
        return super().files(bundle, folder)


class NamesNothing(Stranger):
    @classmethod
    def files(cls, bundle: hub.Bundle, folder: Path) -> tuple[Path, ...]:
        return ()


class NamesWhatIsNotThere(Stranger):
    @classmethod
    def files(cls, bundle: hub.Bundle, folder: Path) -> tuple[Path, ...]:
        return (folder / "gone",)


class Silent(Stranger):
    """Says that it reports, and does not."""

    @classmethod
    def write(cls, bundle: hub.Bundle, folder: Path, *, progress: Any = None) -> Exported:
        return super().write(bundle, folder)


class RefusesByAccident(Stranger):
    @classmethod
    def check(cls, model: Any) -> None:
        if isinstance(model, Decoder) and model.config.experts is not None:
            raise KeyError("gate_proj")


class HoldsNothing(Stranger):
    @classmethod
    def check(cls, model: Any) -> None:
        raise ConfigError("nothing is held")


class DropsTheWindow(Stranger):
    """Holds a model that it computes otherwise."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if self.has_cache:
            self.model.planner = None


FAULTS = {
    LeftMask: "on the left",
    RightMask: "on the right",
    OffByOne: "away",
    Scaled: "away",
    Doubles: "a float32 array",
    OneRow: "away",
    NotANumber: "inf away",
    AnyLength: "text above max_tokens",
    Scribbles: "without changing what it is given",
    OneState: "step of",
    Forgets: "step of",
    LayersOfEmbedding: "states behind layer 0",
    WrongKind: "as the source's",
    NeedsTheSource: "without the source",
    Linked: "in the folder that was given",
    Elsewhere: "folder beside it",
    WritesToTheSource: "source",
    NamesNothing: "one at least",
    NamesWhatIsNotThere: "there, and not empty",
    Silent: "not called",
    RefusesByAccident: "KeyError",
    HoldsNothing: "able to hold one",
    DropsTheWindow: "'stranger' for a window",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: each.__name__)
def test_planted_faults_are_caught(fault: type[Stranger], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerifyError, match=FAULTS[fault]):
        check_exporter(made(fault, monkeypatch), models=SMALL)

"""Runs a pipeline in a folder: a bundle at every border, a ledger of what was done, verdicts."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from deepseek import hub
from deepseek.compress.gates import Contest, TextGate, gate_settings, judge
from deepseek.compress.pipeline import Pipeline, settings_of, summary_of
from deepseek.compress.stage import kind_of
from deepseek.compress.stages import APPLY
from deepseek.compress.work import Outcome, Report, Work
from deepseek.errors import ConfigError, VerifyError, describe
from deepseek.generate.encoder_modules import EngineRunner, why_no_encoder_engine
from deepseek.hub import Bundle, Quantized
from deepseek.hub.atomic import replace_file, writing
from deepseek.models import Decoder, Encoder
from deepseek.records import Parent, StageRecord, Verdict

_FLOOR_TOKENS, _FLOOR_WINDOW = 2048, 256


@dataclasses.dataclass(frozen=True)
class Compressed:
    """What a pipeline gave."""

    bundle: Bundle
    """Of the last stage."""
    verdicts: tuple[Verdict, ...]

    @property
    def is_refused(self) -> bool:
        """Whether a gate did not hold."""
        return not all(verdict.holds for verdict in self.verdicts)


def compress(
    pipeline: Pipeline,
    folder: str | Path,
    *,
    report: Report = lambda words, share: None,
) -> Compressed:
    """Run what is left of a pipeline, and judge what came out.

    A stage that is done is not done again: a run that was stopped goes on from its last border.

    Args:
        pipeline: what is to be done; its model must be here.
        folder: where the run lives: new, empty, or of this same pipeline. Gates may be changed.
        report: told of long work.

    Raises:
        ConfigError: the folder holds another pipeline, or a setting does not fit the model.
        FormatError: a bundle is damaged.
        CapacityError: the disk is full; what was done is there.
        VerifyError: a model behind a stage is broken: see `Pipeline.floor`.
    """
    run = _Run(pipeline, Path(folder), report)
    run.claim()
    for number in range(len(pipeline.stages)):
        run.go_through(number)
    return run.judged()


@dataclasses.dataclass
class _Run:
    pipeline: Pipeline
    folder: Path
    report: Report

    @property
    def start(self) -> Path:
        """The bundle that the pipeline begins with."""
        return hub.resolve(self.pipeline.model)

    def border(self, number: int) -> Path:
        """Return where the bundle behind a stage stands, or the start for -1."""
        if number < 0:
            return self.start
        return self.folder / "stages" / f"{number + 1}-{kind_of(self.pipeline.stages[number])}"

    def claim(self) -> None:
        """Make the folder this pipeline's own, or see that it is. One in which no stage was ended
        is given to another pipeline: what was mistaken in the first can be mended."""
        place = self.folder / "pipeline.json"
        asked = {**self.pipeline.to_dict(), "gates": []}
        if place.is_file():
            with contextlib.suppress(ValueError):
                if json.loads(place.read_text(encoding="utf-8")) == asked:
                    return
            if not (self.folder / "stages").exists():
                replace_file(place, json.dumps(asked, indent=2).encode() + b"\n")
                return
            step = "Give another folder, or the pipeline that it was begun with"
            must = "of this same pipeline"
            raise ConfigError(describe("folder", "compress", must, str(self.folder), step))
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            must, step = "new, empty, or of an earlier run", "Choose a new folder"
            raise ConfigError(describe("folder", "compress", must, str(self.folder), step))
        replace_file(place, json.dumps(asked, indent=2).encode() + b"\n")

    def is_done(self, number: int) -> bool:
        """Whether the bundle behind a stage is there, whole, of these settings and made from what
        stands before it now."""
        place = self.border(number)
        if not (place / "config.json").is_file():
            return False
        card = Bundle.open(place).card
        asked = self.pipeline.hash_until(number)
        if card.stage is None or card.stage.settings.get("pipeline") != asked:
            return False
        parent = Bundle.open(self.border(number - 1)).content_hash
        return [each.content_hash for each in card.parents] == [parent]

    def go_through(self, number: int) -> None:
        """Do a stage, unless it is done."""
        if self.is_done(number):
            return
        began = time.monotonic()
        parent = Bundle.open(self.border(number - 1))
        work = self._work(number, parent)
        stage = self.pipeline.stages[number]
        outcome = _apply_of(stage)(stage, work)
        self._refuse_broken(number, work)
        bundle = self._save(number, work, parent, outcome)
        self._write_line(number, parent, bundle, outcome, time.monotonic() - began)
        shutil.rmtree(work.folder, ignore_errors=True)

    def _work(self, number: int, parent: Bundle) -> Work:
        told = f"stage {number + 1} of {len(self.pipeline.stages)}"
        torch.manual_seed(self.pipeline.seed)
        return Work(
            model=hub.load(parent.path, dtype="float32"),
            start=self.start,
            folder=self._kept(number, parent),
            quantized=hub.quantized_weights(parent),
            seed=self.pipeline.seed,
            report=lambda words, share: self.report(f"{told}: {words}", share),
        )

    def _kept(self, number: int, parent: Bundle) -> Path:
        """Return where a stage keeps what it goes on from; emptied where that is of other settings
        or of another start."""
        folder = self.folder / "kept" / self.border(number).name
        mark = f"{self.pipeline.hash_until(number)} {parent.content_hash}\n".encode()
        place = folder.with_name(f"{folder.name}.of")
        if not place.is_file() or place.read_bytes() != mark:
            shutil.rmtree(folder, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(place, mark)
        return folder

    def _refuse_broken(self, number: int, work: Work) -> None:
        floor = self.pipeline.floor
        if floor is None or not isinstance(work.model, Decoder):
            return
        gate = TextGate(
            most_perplexity_ratio=floor,
            text=self.pipeline.floor_text,
            tokens=_FLOOR_TOKENS,
            window=_FLOOR_WINDOW,
        )
        reference = hub.load(self.start, dtype="float32")
        contest = Contest(work.model, reference, reference, 0, 1)
        verdict = judge(gate, contest, self.report)
        ratio = next(each for each in verdict.measurements if each.name == "perplexity_ratio")
        if not ratio.value <= floor:
            kind = kind_of(self.pipeline.stages[number])
            must = f"at most {floor:g} times the start's, or the model is broken"
            step = "Take less away in one stage, or train between two"
            name = f"perplexity behind stage {number + 1} ({kind})"
            raise VerifyError(describe(name, "the pipeline", must, f"{ratio.value:.4g}", step))

    def _save(self, number: int, work: Work, parent: Bundle, outcome: Outcome) -> Bundle:
        is_last = number == len(self.pipeline.stages) - 1
        if is_last:
            work.model.to(getattr(torch, self.pipeline.dtype))
        stage = self.pipeline.stages[number]
        return hub.save(
            work.model,
            self.border(number),
            name=self.folder.resolve().name,
            stage=StageRecord(
                name=kind_of(stage),
                settings=settings_of(self.pipeline, number),
                version=stage.VERSION,
                seed=self.pipeline.seed,
            ),
            parents=(Parent(name=parent.card.name, content_hash=parent.content_hash),),
            license=parent.card.license,
            measurements=outcome,
            summary=f"{self.pipeline.model}: {summary_of(self.pipeline.stages[: number + 1])}",
            quantized=self._quantized(work, is_last=is_last),
        )

    def _quantized(self, work: Work, *, is_last: bool) -> Quantized | None:
        kv = self.pipeline.kv if is_last else None
        return Quantized(weights=work.quantized, kv=kv) if work.quantized or kv else None

    def _write_line(
        self, number: int, parent: Bundle, bundle: Bundle, outcome: Outcome, seconds: float
    ) -> None:
        line: dict[str, Any] = {
            "stage": number + 1,
            "settings": self.pipeline.stages[number].to_dict(),
            "seed": self.pipeline.seed,
            "parent": parent.content_hash,
            "bundle": bundle.content_hash,
            "parameters": bundle.num_parameters,
            "bytes": bundle.size_bytes,
            "seconds": round(seconds, 3),
            "measurements": [item.to_dict() for item in outcome],
        }
        with (self.folder / "ledger.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def judged(self) -> Compressed:
        """Judge the last bundle, unless these gates have judged it before."""
        bundle = Bundle.open(self.border(len(self.pipeline.stages) - 1))
        asked = json.dumps(gate_settings(self.pipeline.gates), sort_keys=True)
        place = self.folder / "gates.json"
        if bundle.card.verdicts and place.is_file() and place.read_text(encoding="utf-8") == asked:
            return Compressed(bundle, bundle.card.verdicts)
        verdicts: tuple[Verdict, ...] = ()
        if self.pipeline.gates:
            contest = _contest(bundle, self.start)
            verdicts = tuple(judge(gate, contest, self.report) for gate in self.pipeline.gates)
            bundle.set_verdicts(verdicts)
            replace_file(place, asked.encode())
        return Compressed(bundle, verdicts)


def _apply_of(stage: object) -> Any:
    """Return the function that does a stage; its module is imported now."""
    module, name = APPLY[type(stage)].split(":")
    return getattr(importlib.import_module(module), name)


def _contest(bundle: Bundle, start: Path) -> Contest:
    model = hub.load(bundle.path)
    if isinstance(model, Encoder) and why_no_encoder_engine(model) is None:
        model.runner = EngineRunner()
    return Contest(
        model=model,
        reference=hub.load(start, dtype="float32"),
        replaced=hub.load(start),
        num_bytes=bundle.size_bytes,
        reference_parameters=Bundle.open(start).num_parameters,
    )

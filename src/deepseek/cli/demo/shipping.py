"""The demo's way out: an export that another runtime runs, the proof that it computes the same, and
the small signed package that turns the int8 bundle into a fine-tuned one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.demo.state import Demo
from deepseek.cli.output import size
from deepseek.cli.report import Section
from deepseek.records import Measurement

if TYPE_CHECKING:
    from deepseek.cli.output import Progress
    from deepseek.export import Verified
    from deepseek.export.delta import Made

COMMAND = "deepseek demo"
CASES = 50
LONGEST = 128
"""Tokens of a case, at most: `deepseek verify` alone asks a thousand cases of up to 2048."""
STEPS, ROWS, TOKENS, RATE, CHARACTERS = 4, 4, 128, 5e-5, 20_000
"""Of the fine-tuning: enough that most tensors change, and no more."""
MOST_SHARE = 0.2
"""Of the package in the bundle that it stands for."""


def ship(demo: Demo) -> Section:
    """Export to ONNX, verify, and a delta from the int8 bundle to a fine-tuned one."""
    proof = _export_and_verify(demo, demo.scratch)
    made, is_same = _delta(demo, demo.scratch)
    failures = [] if proof.holds else [f"{len(proof.departed)} cases depart from the ONNX export"]
    if made.share > MOST_SHARE:
        failures.append(f"the delta is {made.share:.0%} of the bundle")
    if not is_same:
        failures.append("the bundle that the delta made is not the new version")
    outcome = "applied, file for file" if is_same else "applied, and something else came of it"
    words = (
        f"ONNX, run by {proof.reader}: {proof.num_cases} generated cases, "
        f"{len(proof.departed)} depart\n"
        f"from the int8 bundle ({size(made.bundle_bytes)}) to one trained for {STEPS} steps: "
        f"{size(made.package_bytes)}, {100 * made.share:.1f} %, signed; {outcome}"
    )
    return Section(
        title="Shipped",
        words=words,
        measurements=tuple(_figures(demo, proof, made)),
        failure="; ".join(failures) or None,
    )


def _export_and_verify(demo: Demo, folder: Path) -> Verified:
    from deepseek.export import export, verify

    with demo.out.progress() as progress:
        progress("export to ONNX", None)
        export(demo.bundle, "onnx", folder / "onnx")
        return verify(
            demo.model("float32"),
            folder / "onnx",
            cases=CASES,
            longest=LONGEST,
            progress=progress,
        )


def _delta(demo: Demo, folder: Path) -> tuple[Made, bool]:
    """Return the package from the int8 bundle that was made before to a fine-tuned one, and whether
    the bundle that it was applied to is the new version."""
    from deepseek.export.delta import apply_delta, make_delta, make_keys, on_grid_of

    with demo.out.progress() as progress:
        source = str(demo.bundle.path)
        old = demo.small["int8"]
        tuned = _tuned(demo, folder, progress)
        progress("put on the old grid", None)
        new = on_grid_of(old, tuned, folder / "new", before=source, price_tokens=0)
        private, public = make_keys(folder / "release.key")
        made = make_delta(old, new.bundle, folder / "update.delta", private)
        progress("apply the delta", None)
        applied = apply_delta(made.path, old.path, public)
    return made, applied.bundle.card.files == new.bundle.card.files


def _tuned(demo: Demo, folder: Path, progress: Progress) -> Path:
    """Train all weights for a few steps, and return the folder of the new model."""
    from deepseek.evaluate import default_corpus
    from deepseek.optim import AdamW
    from deepseek.train import Run, Source, Stage, train

    text = folder / "text.txt"
    text.write_text(default_corpus().text[-CHARACTERS:], encoding="utf-8")
    stage = Stage(
        name="tuned",
        data=(Source(path=str(text)),),
        steps=STEPS,
        length=TOKENS,
        batch=ROWS,
        optimizer=AdamW(rate=RATE),
    )
    run = Run(model=str(demo.bundle.path), stages=(stage,))
    return train(run, folder / "run", preparing=progress)


def _figures(demo: Demo, proof: Verified, made: Made) -> list[Measurement]:
    asked = {"format": "onnx", "cases": proof.num_cases, "longest": LONGEST}
    tuned = {"grid": "int8 by rows", "bundle_bytes": made.bundle_bytes, "steps": STEPS}
    found = {
        "departed_cases": (len(proof.departed), asked),
        "delta_share": (made.share, {**tuned, "rate": RATE}),
    }
    return [
        Measurement(
            name=name,
            value=value,
            unit="1",
            conditions={"model": demo.name, **conditions},
            command=COMMAND,
        )
        for name, (value, conditions) in found.items()
    ]

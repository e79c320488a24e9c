"""smollm2-135m-ft: all weights of SmolLM2, trained on what Python's own modules say of themselves.

Run it with: deepseek train examples/smollm2_ft.py --out runs/smollm2-135m-ft
"""
# a run: the docstrings of the standard library are on every machine that runs Python

import ast
import sys
import sysconfig
from pathlib import Path

from deepseek.optim import AdamW, Cosine
from deepseek.train import Run, Source, Stage

TEXT = Path("runs/python-docstrings.txt")


def docstrings() -> str:
    """Return the long docstrings of the standard library's modules, in the order of their names."""
    found: dict[str, None] = {}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    found[text] = None
    return "\n\n".join(found)


def run() -> Run:
    """Return the run: one stage, all weights."""
    if not TEXT.is_file():
        TEXT.parent.mkdir(parents=True, exist_ok=True)
        TEXT.write_text(docstrings(), encoding="utf-8")
        print(f"wrote {TEXT}, {TEXT.stat().st_size} bytes", file=sys.stderr)
    stage = Stage(
        name="smollm2-135m-ft",
        data=(Source(path=str(TEXT)),),
        epochs=1,
        length=512,
        batch=8,
        micro_batch=8,
        optimizer=AdamW(rate=5e-5),
        schedule=Cosine(warmup_steps=10),
        evaluate=("python-topics",),
    )
    return Run(model="smollm2-135m", stages=(stage,), checkpoint_every=50)

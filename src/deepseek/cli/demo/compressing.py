"""The demo's small models: int8 and int4, each behind its gates, beside the one they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.cli.demo.state import Demo
from deepseek.cli.output import number, size
from deepseek.cli.report import Chart, Section
from deepseek.records import Measurement

if TYPE_CHECKING:
    from deepseek.compress import Compressed, Pipeline

COMMAND = "deepseek demo"
TOKENS = 4096
"""That the gates read."""
MOST_RATIO = {"int8": 1.03, "int4": 1.15}
"""Of perplexity: little is learned from, few tokens are read, and the whole interval counts."""
_ON_GRID = "(this model's weights lie on a grid of four bits as they come: int4 is easy on them)"


def compress(demo: Demo) -> Section:
    """The model in int8 and in int4, and what the gates say of each."""
    from deepseek.compress import compress

    done: dict[str, Compressed] = {}
    with demo.out.progress() as progress:
        for name, pipeline in _pipelines(demo).items():
            done[name] = compress(
                pipeline,
                demo.scratch / name,
                report=lambda words, share, name=name: progress(f"{name}: {words}", share),
            )
    demo.small = {name: each.bundle for name, each in done.items()}
    found = [item for name, each in done.items() for item in _figures(demo, name, each)]
    failed = [
        f"{name}: {verdict.words}"
        for name, each in done.items()
        for verdict in each.verdicts
        if not verdict.holds
    ]
    lines = [f"{'':8}{'on disk':>12}{'of float32':>12}{'perplexity':>12}{'gates':>8}"]
    lines += [_line(name, each, found) for name, each in done.items()]
    return Section(
        title="Made smaller",
        words="\n".join([*lines, _ON_GRID]),
        measurements=tuple(found),
        charts=(
            _bars(found, "size_share", "Bundle on disk, share of float32", 0.27),
            _bars(
                found, "perplexity_ratio", "Perplexity, times that of float32", MOST_RATIO["int4"]
            ),
        ),
        failure="; ".join(failed) or None,
    )


def _pipelines(demo: Demo) -> dict[str, Pipeline]:
    from deepseek.compress import Calibration, Pipeline, Quantize, SizeGate, TextGate

    few = Calibration(samples=8, length=256)
    stages = {
        "int8": Quantize(bits=8, group=None, method="round", calibration=few),
        "int4": Quantize(bits=4, group=32, method="gptq", calibration=few),
    }
    shares = {"int8": 0.27, "int4": 0.18}
    return {
        name: Pipeline(
            model=str(demo.bundle.path),
            stages=(stage,),
            gates=(
                TextGate(most_perplexity_ratio=MOST_RATIO[name], tokens=TOKENS),
                SizeGate(most_share=shares[name]),
            ),
        )
        for name, stage in stages.items()
    }


def _figures(demo: Demo, name: str, done: Compressed) -> list[Measurement]:
    wanted = ("size_share", "perplexity_ratio", "kl_divergence", "top1_agreement")
    return [
        Measurement(
            name=item.name,
            value=item.value,
            unit=item.unit,
            spread=item.spread,
            conditions={**item.conditions, "model": demo.name, "engine": name},
            command=COMMAND,
        )
        for verdict in done.verdicts
        for item in verdict.measurements
        if item.name in wanted
    ]


def _line(name: str, done: Compressed, found: list[Measurement]) -> str:
    cells = {item.name: item.value for item in found if item.conditions["engine"] == name}
    share, ratio = f"{100 * cells['size_share']:.1f} %", number(cells["perplexity_ratio"])
    holds = "fail" if done.is_refused else "hold"
    return f"{name:8}{size(done.bundle.size_bytes):>12}{share:>12}{ratio:>12}{holds:>8}"


def _bars(found: list[Measurement], name: str, title: str, limit: float) -> Chart:
    items = [item for item in found if item.name == name]
    return Chart(
        title=title,
        labels=tuple(str(item.conditions["engine"]) for item in items),
        values=tuple(item.value for item in items),
        unit="",
        limit=limit,
    )

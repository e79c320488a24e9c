"""The steps of the demo, in order. A step is a function; a new one is one more entry in `STEPS`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepseek.cli.demo.compressing import compress
from deepseek.cli.demo.serving import serve
from deepseek.cli.demo.shipping import ship
from deepseek.cli.demo.state import Demo
from deepseek.cli.output import number, size
from deepseek.cli.report import Chart, Section
from deepseek.records import Measurement

COMMAND = "deepseek demo"
LOGITS_LIMIT = 1e-4
PERPLEXITY_LIMIT = 5e-5
"""Relative: equal to four digits."""
QUESTION = "Explain in two sentences why the sky is blue."
TEXTS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "def add(a, b):\n    return a + b\n",
    "深度学习 🙂 and a long tail: " + "one two three four five six seven eight nine ten " * 3,
)


def doctor(demo: Demo) -> Section:
    """What this machine has, and which execution each operation uses."""
    from deepseek.cli.verbs.doctor import choice_facts, machine_facts, shown

    machine = machine_facts()
    lines = [f"{name}: {shown(value)}" for name, value in machine.items()]
    lines += [
        f"{row['operation']} ({row['case']}): {row['execution']}, {row['why']}"
        for row in choice_facts()
    ]
    return Section(title="This machine", words="\n".join(lines))


def pull(demo: Demo) -> Section:
    """The model, fetched once and checked."""
    bundle = demo.bundle
    bundle.verify()
    made = ", ".join(parent.name for parent in bundle.card.parents)
    words = (
        f"{bundle.card.summary}\nfrom {made}; {bundle.num_parameters:,} parameters, "
        f"{size(bundle.size_bytes)}; every file hashed: {bundle.content_hash}"
    )
    return Section(title="The model", words=words)


def equality(demo: Demo) -> Section:
    """Our logits against transformers', in float32: whole, padded, and token by token."""
    import torch

    ours, theirs = demo.model("float32"), demo.peer("float32")
    assert ours.tokenizer is not None
    rows = [ours.tokenizer.encode(text) for text in TEXTS]
    found: dict[str, float] = {}
    with torch.inference_mode():
        for row, what in zip(rows, ("English", "code", "mixed"), strict=True):
            tokens = torch.tensor([row])
            expected = theirs(tokens).logits
            found[f"{what}, {len(row)} tokens"] = _distance(ours(tokens).logits, expected)
            cache = ours.new_cache(1, len(row))
            parts = [ours(tokens[:, :5], cache=cache).logits]
            parts += [ours(tokens[:, at : at + 1], cache=cache).logits for at in range(5, len(row))]
            found[f"{what}, token by token"] = _distance(torch.cat(parts, 1), expected)
        for side in ("left", "right"):
            tokens, mask = _padded(rows, side)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
            actual = ours(tokens, mask, positions).logits
            held = mask.bool()
            found[f"batch padded on the {side}"] = _distance(actual[held], expected[held])
    # a NaN is the worst of all, and `max` would pass over it
    worst = max(found.values(), key=lambda value: math.inf if math.isnan(value) else value)
    failure = None
    if not worst <= LOGITS_LIMIT:
        failure = f"logits differ from transformers by {worst:.3g}, more than {LOGITS_LIMIT:g}"
    conditions = {
        "model": demo.name,
        "dtype": "float32",
        "cases": len(found),
        "limit": LOGITS_LIMIT,
    }
    measurement = Measurement(
        name="max_logit_difference", value=worst, unit="1", conditions=conditions, command=COMMAND
    )
    chart = Chart(
        title="Largest difference of a logit from transformers (float32)",
        labels=tuple(found),
        values=tuple(found.values()),
        unit="",
        limit=LOGITS_LIMIT,
        is_log=True,
    )
    words = f"largest difference over {len(found)} cases: {worst:.2g} (limit {LOGITS_LIMIT:g})"
    return Section(
        title="Equal to the reference implementation",
        words=words,
        measurements=(measurement,),
        charts=(chart,),
        failure=failure,
    )


def _distance(actual: Any, expected: Any) -> float:
    return float((actual - expected).abs().max())


def _padded(rows: list[list[int]], side: str) -> tuple[Any, Any]:
    import torch

    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for number_, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[number_, place], mask[number_, place] = torch.tensor(row), 1
    return tokens, mask


def answer(demo: Demo) -> Section:
    """A streamed answer."""
    from deepseek.generate import Completion, chat_prompt, generate

    model = demo.model("bfloat16")
    assert model.tokenizer is not None
    demo.out.say(f"> {QUESTION}")
    completion = generate(
        model,
        chat_prompt(model.tokenizer, [{"role": "user", "content": QUESTION}]),
        max_tokens=80,
        on_piece=lambda piece: demo.out.say(piece.text, end=""),
    )
    assert isinstance(completion, Completion)
    demo.out.say()
    count = len(completion.token_ids)
    words = f"> {QUESTION}\n{completion.text}\n({count} tokens, {completion.total_s:.1f} s)"
    return Section(title="An answer", words=words)


def quality(demo: Demo) -> Section:
    """Perplexity, beside a plain loop over transformers, and retrieval."""
    from deepseek.evaluate import copy_accuracy, default_corpus, needle, perplexity

    corpus = default_corpus()
    model = demo.model("float32")
    assert model.tokenizer is not None
    window, stride, max_tokens = 512, 256, 2560
    with demo.out.progress() as progress:
        ours = perplexity(
            model, corpus, window=window, stride=stride, max_tokens=max_tokens, progress=progress
        ).measurements
        ids = model.tokenizer.encode(corpus.text)[:max_tokens]
        progress("perplexity, plain transformers loop", None)
        theirs = plain_perplexity(demo.peer("float32"), ids, window, stride)
        found = [*ours]
        for length in (512, 1024):
            found += copy_accuracy(
                model, length=length, num_items=4, progress=progress
            ).measurements
        found += needle(model, length=1024, num_items=4, progress=progress).measurements
    mine = next(item.value for item in ours if item.name == "perplexity")
    failure = None
    if not math.isclose(mine, theirs, rel_tol=PERPLEXITY_LIMIT):
        failure = f"perplexity is {mine:.6g}, a plain transformers loop gives {theirs:.6g}"
    reference = Measurement(
        name="perplexity_plain_transformers",
        value=theirs,
        unit="1",
        conditions={"window": window, "stride": stride, "tokens": len(ids)},
        command=COMMAND,
    )
    words = f"perplexity {number(mine)}; a plain loop over transformers gives {number(theirs)}"
    shares = [item for item in found if item.name.endswith("accuracy")]
    chart = Chart(
        title="Retrieval: share found",
        labels=tuple(f"{m.name}, {m.conditions.get('length')} tokens" for m in shares),
        values=tuple(m.value for m in shares),
        unit="",
    )
    return Section(
        title="Quality",
        words=words,
        measurements=(*found, reference),
        charts=(chart,) if shares else (),
        failure=failure,
    )


def plain_perplexity(model: Any, ids: list[int], window: int, stride: int) -> float:
    """Return perplexity by the loop of the transformers guide on fixed-length models."""
    import torch

    total, count, scored = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        tokens = torch.tensor([ids[start:stop]])
        labels = tokens.clone()
        labels[:, : scored - start] = -100
        new = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += float(model(tokens, labels=labels).loss) * new
        count, scored = count + new, stop
        if stop == len(ids):
            break
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def speed(demo: Demo) -> Section:
    """The token loop beside transformers' own: same weights, dtype, threads and prompt."""
    from deepseek.cli.side_by_side import compare_speed

    with demo.out.progress() as progress:
        found = compare_speed(
            demo.model("bfloat16"),
            demo.peer("bfloat16"),
            num_prompt_tokens=128,
            num_new_tokens=48,
            num_repeats=3,
            command=COMMAND,
            progress=progress,
        )
    charts = [
        _sides(found, "decode_tokens_per_s", "Decoding, batch 1, bfloat16"),
        _sides(found, "prefill_tokens_per_s", "Reading a prompt of 128 tokens, bfloat16"),
    ]
    ratio = next(item for item in found if item.name == "decode_speed_ratio")
    words = f"decoding is {number(ratio.value)} times as fast as transformers.generate here"
    return Section(title="Speed", words=words, measurements=tuple(found), charts=tuple(charts))


def engines(demo: Demo) -> Section:
    """Every scheme of the engine in a process of its own, beside other engines that are here."""
    from deepseek.cli.demo.contenders import contenders, scheme_losses
    from deepseek.cli.side_by_side import compare_processes

    with tempfile.TemporaryDirectory() as folder, demo.out.progress() as progress:
        found = compare_processes(
            contenders(demo.bundle, Path(folder)),
            num_prompt_tokens=512,
            num_new_tokens=64,
            num_rounds=1,
            command=COMMAND,
            progress=progress,
        )
        progress("what the schemes lose", None)
        losses = scheme_losses(demo.bundle, demo.model("float32"), COMMAND)
    charts = [
        _sides(found, name, title)
        for name, title in (
            ("decode_tokens_per_s", "Decoding behind 512 tokens, batch 1"),
            ("prefill_tokens_per_s", "Reading a prompt of 512 tokens"),
            ("cold_start_s", "From the start of a process to its first token, files warm"),
            ("process_peak_rss_bytes", "Peak memory of that process"),
        )
    ]
    words = _engine_table([*found, *losses])
    return Section(
        title="Engines",
        words=words,
        measurements=(*found, *losses),
        charts=tuple(charts),
    )


def _engine_table(found: Sequence[Measurement]) -> str:
    heads = {
        "prefill_tokens_per_s": "prompt tok/s",
        "decode_tokens_per_s": "decode tok/s",
        "cold_start_s": "cold start",
        "process_peak_rss_bytes": "peak memory",
        "perplexity_ratio": "perplexity",
    }
    names = dict.fromkeys(str(item.conditions["engine"]) for item in found)
    lines = [f"{'':22}" + "".join(f"{head:>14}" for head in heads.values())]
    for name in names:
        cells = {i.name: _cell(i) for i in found if i.conditions["engine"] == name}
        lines.append(f"{name:22}" + "".join(f"{cells.get(key, ''):>14}" for key in heads))
    return "\n".join(lines)


def _cell(item: Measurement) -> str:
    if item.unit == "bytes":
        return size(int(item.value))
    return f"{number(item.value)} s" if item.unit == "s" else number(item.value)


def _sides(found: Sequence[Measurement], name: str, title: str) -> Chart:
    """Return one figure of every engine."""
    items = [item for item in found if item.name == name]
    scale, unit = (2**20, "MiB") if items[0].unit == "bytes" else (1, items[0].unit)
    return Chart(
        title=title,
        labels=tuple(str(item.conditions["engine"]) for item in items),
        values=tuple(item.value / scale for item in items),
        unit=unit,
    )


STEPS: tuple[Callable[[Demo], Section], ...] = (
    doctor,
    pull,
    equality,
    answer,
    quality,
    speed,
    engines,
    compress,
    ship,
    serve,
)

"""Gradients in few bits between workers: the loss that training ends with, bytes, and when it pays.

    python benchmarks/transport.py                       # a model of 0.9 million, from scratch
    python benchmarks/transport.py --model smollm2-135m --rate 2e-5 --steps 20 --batch 4
    python benchmarks/transport.py --quick

Every way trains the same model on the same samples (`python-topics`), by turns, in several worker
processes of this machine that talk over gloo. Bytes are counted twice: those that the transport
hands to the collectives, and all that the process wrote (`wchar` of `/proc/self/io`: sockets and
headers). The baseline of 16 bits is a bfloat16 all-reduce of as many values, counted in the same
way. Timings are of a machine whose workers share processor and memory with their own network: they
say what sending costs there, and the table of speeds says what it would cost elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deepseek.cli.models import positive
from deepseek.parallel import (
    Exact,
    Job,
    Sparse24,
    TransportConfig,
    World,
    estimate,
    joined_world,
    open_transport,
    pays_below,
    run_workers,
)
from deepseek.parallel.payoff import Way
from deepseek.records import Measurement, Spread, summarize

WAYS: dict[str, TransportConfig] = {
    "float32": Exact(),
    "2:4 float8": Sparse24(),
    "2:4 float8, all kept": Sparse24(feedback=1.0),
    "2:4 float8, none kept": Sparse24(feedback=0.0),
    "2:4 bfloat16": Sparse24(values="bfloat16"),
}
"""Of what is not sent a quarter is kept for the next step, unless said."""
PREDICTED: dict[str, Way] = {
    "float32, pairs": "tree",
    "float32, ring": "ring",
    "bfloat16, ring": "ring-bfloat16",
    "2:4 float8": "sparse24-float8",
    "2:4 bfloat16": "sparse24-bfloat16",
}
SPEEDS = (0.1, 1.0, 10.0, 100.0)
"""Gbit/s of the table."""
SMALL = "small"
"""The model that needs no download: bytes as tokens, 0.9 million parameters."""
QUICK = {"steps": 6, "seeds": [0], "rounds": 1, "ways": ["float32", "2:4 float8"], "length": 32}
"""What `--quick` takes: it shows that all runs, no more."""


def small_model(seed: int) -> Any:
    """Return a decoder with random weights and one token a byte."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from deepseek.data import Tokenizer
    from deepseek.models import Decoder, DecoderConfig

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([tokenizers.AddedToken("<end>", special=True)])
    torch.manual_seed(seed)
    model = Decoder(
        DecoderConfig(
            vocab_size=257,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            intermediate_size=352,
            max_positions=1024,
        )
    )
    model.tokenizer = Tokenizer(backend, eos_token="<end>")
    return model


def work(options: argparse.Namespace) -> int:
    """Train as one worker, and print what was found where this is the first one."""
    from deepseek.ops.memory import keep_freed_memory
    from deepseek.optim import AdamW, Muon, WarmupStableDecay, build_optimizers
    from deepseek.train import Run, Source, Stage
    from deepseek.train.origin import open_model
    from deepseek.train.places import Places
    from deepseek.train.sources import Opener
    from deepseek.train.step import BatchStep, choose_parameters

    torch.set_num_threads(options.threads)
    keep_freed_memory()
    make = Muon if options.optimizer == "muon" else AdamW
    stage = Stage(
        name="compared",
        data=(Source(path="python-topics"),),
        steps=options.steps,
        length=options.length,
        batch=options.batch,
        precision=options.precision,
        optimizer=make(rate=options.rate),
        schedule=WarmupStableDecay(warmup_steps=max(1, options.steps // 20)),
        transport=WAYS[options.ways[0]],
        sends_early=not options.late,
    )
    (seed,) = options.seeds
    run = Run(model=options.model, stages=(stage,), seed=seed)
    with joined_world() as world:
        model = small_model(seed) if options.model == SMALL else open_model(run)
        model.train()
        windows = Opener.of(run, model, Places(Path(options.alone)), world).open(0)
        parameters = choose_parameters(model, stage.trains)
        transport = open_transport(stage.transport, world)
        step = BatchStep(
            model, parameters, build_optimizers(stage.optimizer, parameters), stage, windows,
            world=world, transport=transport, seed=seed,
        )  # fmt: skip
        losses, times = [], []
        world.barrier()
        before = written_bytes()
        for number in range(options.steps):
            start = time.perf_counter()
            losses.append(step.run(number, options.steps).loss)
            times.append(time.perf_counter() - start)
        counted = written_bytes() - before
        step.close()
        matrices = sum(value.numel() for _, value in parameters if value.dim() > 1)
        found = {
            "losses": losses,
            "step_s": times,
            "bytes": transport.num_bytes / options.steps,
            "socket_bytes": counted / options.steps,
            "num_values": matrices,
            "all_values": sum(value.numel() for _, value in parameters) + 1,
            "ring_bytes": ring_bytes(world, matrices),
        }
    if world.is_first:
        (Path(options.alone) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


def written_bytes() -> int:
    """Return what this process wrote to files and sockets since it began."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def ring_bytes(world: World, num_values: int) -> int:
    """Return what a bfloat16 all-reduce of so many values writes."""
    import torch.distributed as dist

    values = torch.zeros(num_values, dtype=torch.bfloat16)
    world.barrier()
    before = written_bytes()
    dist.all_reduce(values)
    return written_bytes() - before


def trained(way: str, seed: int, options: argparse.Namespace, *, late: bool = False) -> Any:
    """Return what the first worker of a run found."""
    words = [sys.executable, __file__, "--ways", way, "--seeds", str(seed)]
    for flag in ("model", "steps", "length", "batch", "precision", "optimizer", "rate", "threads"):
        words += [f"--{flag}", str(getattr(options, flag))]
    with tempfile.TemporaryDirectory(prefix="deepseek-transport-") as folder:
        code = run_workers(
            [*words, "--alone", folder, *(["--late"] if late else [])], options.workers
        )
        if code:
            sys.exit(f"transport: {way} failed with code {code}")
        return json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))


def last_loss(losses: list[float]) -> float:
    """Return the mean of the last tenth."""
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def codec_speed(way: str) -> tuple[float, float]:
    """Return the seconds that packing and reading a value take here on one thread."""
    from deepseek.parallel.compress import Codec

    codec = Codec("float8" if "float8" in way else "bfloat16")
    torch.set_num_threads(1)
    values, times = torch.randn(1 << 22), ([], [])
    for _ in range(5):
        start = time.perf_counter()
        packed = codec.encode(values)
        middle = time.perf_counter()
        codec.decode(packed, torch.empty_like(values))
        times[0].append(middle - start)
        times[1].append(time.perf_counter() - middle)
    return min(times[0]) / len(values), min(times[1]) / len(values)


def measure(options: argparse.Namespace, command: str) -> list[Measurement]:
    """Return losses, bytes and times of each way, and predictions for other networks."""
    names = ("model", "workers", "threads", "steps", "batch", "length", "precision", "optimizer")
    about = {name: getattr(options, name) for name in (*names, "rate", "seeds")}
    found: dict[str, list[Any]] = {way: [] for way in options.ways}
    for seed in options.seeds:
        for way in options.ways:
            found[way].append(trained(way, seed, options))
            tell(f"seed {seed}, {way}: loss {last_loss(found[way][-1]['losses']):.4f}")
    rest: dict[str, Any] = {"command": command}
    measured = []
    for way, runs in found.items():
        said = {**about, "way": way}
        losses = [last_loss(run["losses"]) for run in runs]
        measured.append(average("final_loss", losses, "nats", conditions=said, **rest))
        if "float32" in found and way != "float32":
            plain = [last_loss(run["losses"]) for run in found["float32"]]
            more = [one - other for one, other in zip(losses, plain, strict=True)]
            measured.append(average("loss_over_float32", more, "nats", conditions=said, **rest))
        measured += bytes_of(way, runs, found, {"conditions": said, **rest})
    measured += times_of(options, about, rest)
    return [*measured, *predicted(options, found, measured, {"conditions": about, **rest})]


def bytes_of(
    way: str, runs: list[Any], found: dict[str, list[Any]], rest: dict[str, Any]
) -> list[Measurement]:
    """Return the bytes that a worker sends in a step, and what that is of other ways' bytes."""
    run, said = runs[0], rest["conditions"]
    facts = [
        ("bytes_a_step", run["bytes"], "bytes"),
        ("bytes_a_step_at_the_sockets", run["socket_bytes"], "bytes"),
        ("bits_a_value", run["socket_bytes"] * 8 / run["all_values"], "bits"),
        ("share_of_a_bfloat16_all_reduce", run["socket_bytes"] / run["ring_bytes"], "1"),
    ]
    if "float32" in found:
        share = run["socket_bytes"] / found["float32"][0]["socket_bytes"]
        facts.append(("share_of_float32", share, "1"))
    rest = {**rest, "conditions": {**said, "values": run["all_values"]}}
    return [Measurement(name=name, value=value, unit=unit, **rest) for name, value, unit in facts]


def times_of(
    options: argparse.Namespace, about: dict[str, Any], rest: dict[str, Any]
) -> list[Measurement]:
    """Return the time of a step of each way, sent early and late, by turns."""
    short = argparse.Namespace(**{**vars(options), "steps": min(options.steps, 12)})
    turns = [(way, late) for way in options.ways for late in (False, True)]
    times: dict[tuple[str, bool], list[float]] = {turn: [] for turn in turns}
    for _ in range(options.rounds):
        for way, late in turns:
            steps = trained(way, options.seeds[0], short, late=late)["step_s"]
            times[way, late].append(statistics.median(steps[len(steps) // 4 :]))
    return [
        summarize(
            "step_s", values, "s",
            conditions={**about, "way": way, "sent": "late" if late else "early"}, **rest,
        )
        for (way, late), values in times.items()
    ]  # fmt: skip


def predicted(
    options: argparse.Namespace,
    found: dict[str, list[Any]],
    measured: list[Measurement],
    rest: dict[str, Any],
) -> list[Measurement]:
    """Return what a step would take over networks of other speeds, and below which one it pays."""
    late = [m.value for m in measured if m.name == "step_s" and m.conditions["sent"] == "late"]
    num_values = next(iter(found.values()))[0]["num_values"]
    results = []
    for name, way in PREDICTED.items():
        encode_s, decode_s = codec_speed(name)
        job = Job(
            num_values=num_values,
            workers=options.workers,
            # the fastest way's step; what sending costs between processes here is still in it
            compute_s=min(late),
            # a backward pass is two thirds of the products
            hidden_s=min(late) * 2 / 3,
            encode_s=encode_s,
            decode_s=decode_s,
        )
        said = {**rest["conditions"], "way": name}
        for speed in SPEEDS:
            value = estimate(job, way, speed).step_s
            conditions = {**said, "gbit_per_s": speed}
            results.append(
                Measurement(
                    name="predicted_step_s", value=value, unit="s",
                    conditions=conditions, command=rest["command"],
                )
            )  # fmt: skip
        if way.startswith("sparse24"):
            for other in ("tree", "ring-bfloat16"):
                conditions = {**said, "over": other, "encode_s": encode_s, "decode_s": decode_s}
                results.append(
                    Measurement(
                        name="pays_below", value=pays_below(job, way, other), unit="Gbit/s",
                        conditions=conditions, command=rest["command"],
                    )
                )  # fmt: skip
    return results


def average(name: str, values: list[float], unit: str, **rest: Any) -> Measurement:
    """Return the mean over the seeds, and the least and most."""
    spread = Spread("min-max", min(values), max(values))
    return Measurement(name=name, value=statistics.mean(values), unit=unit, spread=spread, **rest)


def tell(words: str) -> None:
    """Say how far it is."""
    print(words, file=sys.stderr, flush=True)


def show(found: list[Measurement]) -> None:
    """Print a line for each figure."""
    for item in found:
        said = item.conditions
        who = " ".join(
            str(said[name]) for name in ("way", "sent", "over", "gbit_per_s") if name in said
        )
        spread = item.spread and f"[{item.spread.low:.4g} to {item.spread.high:.4g}]"
        print(f"{item.name:31} {who:30} {item.value:10.5g} {item.unit:6} {spread or ''}")


def main() -> int:
    """Measure, and print lines or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMALL, help="a bundle; small needs none (small)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=1, help="of a worker (1)")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=16, help="rows of a step (16)")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a row (64)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=positive, default=3, help="of the timing (3)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (1e-3)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--late", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.alone:
        return work(options)
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    command = shlex.join(["python", "benchmarks/transport.py", *sys.argv[1:]])
    found = measure(options, command)
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")

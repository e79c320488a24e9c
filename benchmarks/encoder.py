"""An encoder that classifies texts, on our engine beside every other execution of it, by turns.

    python benchmarks/encoder.py                         # BERT-base with random weights
    python benchmarks/encoder.py --model FOLDER --small FOLDER

Contenders stay loaded in processes of their own and take turns, so that whatever else the machine
does meets all of them; ratios are to the others of the same round. `--small` is a bundle that was
made smaller: our schemes run on it too, and the grid that it is stored on. Before anything is timed
every contender's logits are held against those of PyTorch in float32. ONNX Runtime needs
`pip install onnxruntime onnx onnxscript`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.records import Measurement, summarize

SCHEMES = ("float32", "bfloat16", "int8", "int8-row", "int4")
PEERS = ("eager float32", "eager bfloat16", "compiled float32", "compiled bfloat16")
ONNX = ("onnxruntime float32", "onnxruntime int8")
FULL_PRECISION = ("eager float32", "compiled float32", "onnxruntime float32")
HALF_PRECISION = ("eager bfloat16", "compiled bfloat16")
LEAST_LIKENESS = {"float32": 0.99999, "bfloat16": 0.995, "int8": 0.95, "int4": 0.8}
"""Cosine with the logits of PyTorch in float32, by the contender's storage."""
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
NUM_LABELS = 77


def tokens_of(length: int, batch: int) -> np.ndarray:
    """Return the same ids in every process: int64 [batch, length]."""
    return np.random.default_rng(0).integers(1000, 20000, (batch, length))


def make_random(folder: Path, layers: int) -> None:
    """Write BERT-base with random weights as transformers does."""
    import torch
    import transformers

    torch.manual_seed(0)
    names = {number: f"class {number}" for number in range(NUM_LABELS)}
    sizes = {**BERT_BASE, "num_hidden_layers": layers, "id2label": names}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.04)
            elif "LayerNorm.weight" not in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)


def our_contender(asked: dict[str, Any], tokens: np.ndarray) -> Callable[[], np.ndarray]:
    """Return a call of our engine."""
    from deepseek.face import load_encoder_engine

    engine = load_encoder_engine(asked["model"], scheme=asked["scheme"], threads=asked["threads"])
    texts = tokens.tolist()
    return lambda: engine.logits(texts)


def torch_contender(asked: dict[str, Any], tokens: np.ndarray) -> Callable[[], np.ndarray]:
    """Return a call of transformers' model, eager or compiled."""
    import torch
    import transformers

    torch.set_num_threads(asked["threads"])
    how, dtype = asked["name"].split()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        asked["model"], dtype=getattr(torch, dtype)
    ).eval()
    run = torch.compile(model) if how == "compiled" else model
    ids = torch.from_numpy(tokens)

    def call() -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(run(input_ids=ids).logits.float())

    return call


def onnx_contender(asked: dict[str, Any], tokens: np.ndarray) -> Callable[[], np.ndarray]:
    """Return a call of ONNX Runtime, whose optimizer for BERT has fused what it can; int8 is its
    dynamic quantization."""
    import onnxruntime
    import torch
    import transformers
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        asked["model"], dtype=torch.float32
    ).eval()
    ids = torch.from_numpy(tokens)
    with tempfile.TemporaryDirectory() as folder:
        plain, path = f"{folder}/plain.onnx", f"{folder}/model.onnx"
        torch.onnx.export(
            model,
            (ids,),
            plain,
            dynamo=True,
            input_names=["input_ids"],
            output_names=["logits"],
        )
        config = model.config
        fused = optimize_model(
            plain, "bert", config.num_attention_heads, config.hidden_size, opt_level=0
        )
        fused.save_model_to_file(path, use_external_data_format=True)
        if asked["name"].endswith("int8"):
            quantize_dynamic(path, f"{folder}/int8.onnx")
            path = f"{folder}/int8.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = asked["threads"]
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: np.asarray(session.run(["logits"], {"input_ids": tokens})[0])


def serve_turns(asked: dict[str, Any]) -> None:
    """Be a contender: say the logits, then the seconds of a call for every line that comes."""
    tokens = tokens_of(asked["length"], asked["batch"])
    makers = {"onnxruntime": onnx_contender, "deepseek": our_contender}
    with open(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        call = makers.get(asked["name"].split()[0], torch_contender)(asked, tokens)
        logits = call()
        for _ in range(3):
            call()
        print(json.dumps(logits.tolist()), file=answers, flush=True)
        for _ in sys.stdin:
            call()  # others have had the caches
            samples = []
            for _ in range(asked["calls"]):
                before = time.perf_counter()
                call()
                samples.append(time.perf_counter() - before)
            print(json.dumps(statistics.median(samples)), file=answers, flush=True)


class Contender:
    """A process that is loaded and waits for its turn."""

    def __init__(self, name: str, asked: dict[str, Any]) -> None:
        """Start it and wait until it is warm."""
        self.name = name
        words = [sys.executable, __file__, "--contender", json.dumps({**asked, "name": name})]
        environment = {**os.environ, "OMP_NUM_THREADS": str(asked["threads"])}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.logits = np.array(self._read())

    def turn(self) -> float:
        """Return the median seconds of some calls."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"encoder: {self.name} ended with code {self._process.wait()}")
        return json.loads(line)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of two results."""
    return float((one * other).sum() / math.sqrt((one**2).sum() * (other**2).sum()))


def check(contender: Contender, reference: np.ndarray, storage: str) -> None:
    """End with a word where a contender computes something else."""
    found, least = likeness(contender.logits, reference), LEAST_LIKENESS[storage.split("-")[0]]
    if not found >= least:
        sys.exit(f"encoder: logits of {contender.name} have cosine {found:.5f}, below {least}")


def contenders(options: argparse.Namespace, folder: Path) -> list[Contender]:
    """Start all of them, and check what they compute."""
    shared = {name: getattr(options, name) for name in ("threads", "length", "batch", "calls")}
    whole = {**shared, "model": str(folder)}
    names = [name for name in (*PEERS, *ONNX) if name in options.peers]
    found = [Contender(name, whole) for name in names]
    reference = found[names.index("eager float32")].logits
    for each in found:
        check(each, reference, each.name.split()[1])
    for scheme in options.schemes:
        ours = Contender(f"deepseek {scheme}", {**whole, "scheme": scheme})
        check(ours, reference, scheme)
        found.append(ours)
    if options.small is not None:
        for scheme in (None, *options.schemes):
            small = {**shared, "model": str(options.small), "scheme": scheme}
            found.append(Contender(f"deepseek small {scheme or 'stored'}", small))
    return found


def ratios(
    samples: dict[str, list[float]], conditions: dict[str, Any], command: str
) -> list[Measurement]:
    """Return how many times faster ours are than the best of several others, round by round."""
    found = []
    bases = {"float32": FULL_PRECISION, "bfloat16": HALF_PRECISION, "eager_float32": PEERS[:1]}
    for base, names in bases.items():
        rows = [samples[name] for name in names if name in samples]
        for name, values in samples.items():
            if not rows or not name.startswith("deepseek"):
                continue
            best = [min(column) for column in zip(*rows, strict=True)]
            faster = [other / own for other, own in zip(best, values, strict=True)]
            about = {**conditions, "contender": name}
            key = f"speed_over_best_{base}" if len(names) > 1 else f"speed_over_{base}"
            found.append(summarize(key, faster, "1", conditions=about, command=command))
    return found


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description="An encoder on our engine beside others.")
    parser.add_argument("--model", type=Path, help="a bundle of a classifier (random BERT-base)")
    parser.add_argument("--small", type=Path, help="the same, made smaller")
    parser.add_argument("--layers", type=int, default=12, help="of the random one (12)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text (128)")
    parser.add_argument("--batch", type=int, default=1, help="texts of a call (1)")
    parser.add_argument("--threads", type=int, default=2, help="of each contender (2)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (7)")
    parser.add_argument("--calls", type=int, default=9, help="of a turn, whose median counts (9)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help="ours")
    parser.add_argument("--peers", nargs="+", default=[*PEERS, *ONNX], help="the others")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender is not None:
        return serve_turns(json.loads(options.contender))
    options.peers = sorted({"eager float32", *options.peers})
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch)
        if options.model is None:
            make_random(folder, options.layers)
        listed = contenders(options, folder)
        samples: dict[str, list[float]] = {each.name: [] for each in listed}
        for _ in range(options.rounds):
            for each in listed:
                samples[each.name].append(each.turn())
        for each in listed:
            each.close()
    conditions = {name: getattr(options, name) for name in ("length", "batch", "threads", "layers")}
    conditions["model"] = "random BERT-base" if options.model is None else options.model.name
    command = "python benchmarks/encoder.py"
    found = [
        summarize(
            "seconds_per_call",
            values,
            "s",
            conditions={**conditions, "contender": name},
            command=command,
        )
        for name, values in samples.items()
    ]
    found += ratios(samples, conditions, command)
    if options.json:
        return print(json.dumps({"measurements": [each.to_dict() for each in found]}))
    for each in found:
        spread = each.spread
        ends = "" if spread is None else f"  ({spread.low:.4g} to {spread.high:.4g})"
        print(f"{each.name:28} {each.conditions['contender']:26} {each.value:.4g}{ends}")
    return None


if __name__ == "__main__":
    main()

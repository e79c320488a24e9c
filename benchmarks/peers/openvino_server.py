"""OpenVINO GenAI's continuous batching behind the smallest HTTP server that `benchmarks/serve.py`
can ask: `/v1/completions` with streaming, `/v1/models`. Standard library and OpenVINO GenAI alone.

    ENV/bin/python benchmarks/peers/openvino_server.py --model FOLDER_OR_GGUF --port 8000

One thread steps the pipeline and hands tokens over; tokens are turned to text one at a time, which
is less work than a real server has. A step keeps Python to itself, so between two the tokens are
let out: else they would come in bunches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

Answer = asyncio.Queue["list[int] | None"]
"""Tokens as they come; None at the end."""


class Engine:
    """The pipeline and the thread that steps it."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the model."""
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = not options.no_prefix_caching
        scheduler.cache_size = options.cache_gb
        scheduler.max_num_seqs = max(scheduler.max_num_seqs, options.max_seqs)
        properties = {
            "INFERENCE_NUM_THREADS": options.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.pipe = genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)
        self.tokenizer = self.pipe.get_tokenizer()
        self._new: queue.Queue[tuple[list[int], int, bool, Answer]] = queue.Queue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, tokens: list[int], count: int, ignore_eos: bool) -> Answer:
        """Return where the tokens of an answer will come."""
        answer: Answer = asyncio.Queue()
        self._new.put((tokens, count, ignore_eos, answer))
        return answer

    def _run(self) -> None:
        running: list[tuple[Any, Answer]] = []
        number = 0
        while True:
            while not self._new.empty() or not running:
                tokens, count, ignore_eos, answer = self._new.get()
                number += 1
                config = genai.GenerationConfig()
                config.max_new_tokens, config.do_sample = count, False
                config.ignore_eos = ignore_eos
                given = ov.Tensor(np.array([tokens], dtype=np.int64))
                running.append((self.pipe.add_request(number, given, config), answer))
            self.pipe.step()
            for handle, answer in running:
                while handle.can_read():
                    ids = [each for out in handle.read().values() for each in out.generated_ids]
                    self._loop.call_soon_threadsafe(answer.put_nowait, ids)
            alive = genai.GenerationStatus.RUNNING
            for handle, answer in running:
                if handle.get_status() != alive:
                    self._loop.call_soon_threadsafe(answer.put_nowait, None)
            running = [pair for pair in running if pair[0].get_status() == alive]
            asyncio.run_coroutine_threadsafe(self._let_out(), self._loop).result()

    async def _let_out(self) -> None:
        """Return when the tokens handed over before have been sent."""
        for _ in range(3):
            await asyncio.sleep(0)


async def serve(options: argparse.Namespace) -> None:
    """Serve until the process is stopped."""
    engine = Engine(options)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            lengths = [line[15:] for line in head if line.lower().startswith("content-length:")]
            body = await reader.readexactly(int(lengths[0]) if lengths else 0)
            if head[0].startswith("POST /v1/completions "):
                await complete(engine, json.loads(body), writer)
            elif head[0].startswith("GET /v1/models "):
                answer_whole(writer, 200, {"data": [{"id": "openvino"}]})
            else:
                answer_whole(writer, 404, {"error": {"message": "no such page"}})
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", options.port)
    await server.serve_forever()


async def complete(engine: Engine, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Stream an answer."""
    tokens = engine.tokenizer.encode(asked["prompt"]).input_ids.data[0].tolist()
    answer = engine.ask(tokens, asked["max_tokens"], asked.get("ignore_eos", False))
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
    count = 0
    while (ids := await answer.get()) is not None:
        count += len(ids)
        text = engine.tokenizer.decode(ids)
        choice = {"index": 0, "text": text, "finish_reason": None, "logprobs": None}
        send(writer, {"object": "text_completion", "choices": [choice]})
        await writer.drain()
    last = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
    send(writer, {"object": "text_completion", "choices": [last]})
    usage = {"prompt_tokens": len(tokens), "completion_tokens": count}
    send(writer, {"object": "text_completion", "choices": [], "usage": usage})
    writer.write(b"data: [DONE]\n\n")


def send(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    """Send an event."""
    writer.write(f"data: {json.dumps(event)}\n\n".encode())


def answer_whole(writer: asyncio.StreamWriter, status: int, value: dict[str, Any]) -> None:
    """Answer with an object."""
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} Told\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)


def main() -> None:
    """Read the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gb", type=int, default=2)
    parser.add_argument("--max-seqs", type=int, default=16)
    parser.add_argument("--no-prefix-caching", action="store_true")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()

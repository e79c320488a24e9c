"""The values that a server chooses for itself, and their reasons."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deepseek.errors import CapacityError
from deepseek.serve.assembly import build_service
from deepseek.serve.automatic import Asked, choose_values, free_memory
from deepseek.serve.generation import GenerationRequest
from tests.ops.native import NEEDS_KERNELS
from tests.serve.engines import tiny_engine


def machine(folder: Path, free_kib: int, limit: str | None, current: int) -> tuple[int, str]:
    info = folder / "meminfo"
    info.write_text(f"MemTotal: 9999 kB\nMemAvailable: {free_kib} kB\n")
    if limit is not None:
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{current}\n")
    return free_memory(info, folder)


def test_free_memory_is_the_tighter_of_machine_and_control_group(tmp_path: Path) -> None:
    assert machine(tmp_path, 1000, None, 0) == (1024_000, "this machine")
    assert machine(tmp_path, 1000, "max", 5) == (1024_000, "this machine")
    assert machine(tmp_path, 1000, "700000", 100_000) == (600_000, "its control group")
    assert machine(tmp_path, 1000, "100", 5000) == (0, "its control group")
    assert machine(tmp_path, 1000, "nonsense", 5000) == (1024_000, "this machine")


@NEEDS_KERNELS
def test_what_was_asked_for_is_kept_and_every_value_has_a_reason() -> None:
    engine = tiny_engine()
    asked = Asked(pages=9, max_running=3, step_tokens=70, max_waiting=5)
    values = choose_values(engine, asked)
    assert [value.value for value in values.listed()][1:] == [9, 3, 70, 5]
    free = choose_values(engine, Asked())
    assert all(value.why for value in (*values.listed(), *free.listed()))
    assert free.pages.value == free.max_running.value * 512 // 64
    assert 64 <= free.step_tokens.value <= 512


@NEEDS_KERNELS
def test_pages_for_less_than_one_request_are_refused() -> None:
    with pytest.raises(CapacityError, match="at least 8, for one request"):
        choose_values(tiny_engine(), Asked(pages=7))


@NEEDS_KERNELS
def test_a_service_is_put_together_and_answers() -> None:
    async def body() -> list[int]:
        service, _ = build_service(tiny_engine(), Asked(pages=16), model="tiny")
        await service.start()
        wanted = GenerationRequest(prompt=(1, 2, 3), max_tokens=5, ignore_eos=True)
        found = [output async for output in service.generate(wanted)]
        assert service.is_ready()
        await service.stop()
        assert not service.is_ready()
        return [choice.token_id for output in found for choice in output.tokens]

    assert len(asyncio.run(body())) == 5

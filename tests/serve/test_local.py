"""A server for the time of a block."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from deepseek.errors import BackendError
from deepseek.serve import local_server
from tests.ops.native import NEEDS_KERNELS
from tests.serve.bundles import tiny_bundle


@NEEDS_KERNELS
def test_it_answers_inside_the_block_and_is_gone_behind_it(tmp_path: Path) -> None:
    with local_server(tiny_bundle(tmp_path), ["--pages", "40", "--name", "tiny"]) as server:
        url = server.url
        body = {"model": "tiny", "prompt": "x", "max_tokens": 3}
        answer = httpx.post(f"{url}/completions", json=body)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")


def test_what_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendError, match=r"did not start .*no-such-model"),
        local_server(tmp_path / "no-such-model"),
    ):
        pass

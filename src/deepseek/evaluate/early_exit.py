"""What early exits lose and save on texts that are given, measured as they are used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import Progress, measuring, target_scores
from deepseek.evaluate.intervals import FloatArray, bootstrap_ratio, clustered_wilson
from deepseek.models import Decoder, Exits, forward_with_exits
from deepseek.records import Measurement, Spread


@dataclasses.dataclass(frozen=True)
class ExitScores:
    """What exits did on some texts."""

    exits: Exits
    differs: Tensor
    """bool [texts, tokens]: whether the likeliest token behind one is not the whole model's."""
    depths: Tensor
    """int64 [texts, tokens]: layers that each went through."""
    losses: Tensor
    """float64 [texts, tokens - 1]: of the next tokens, in nats."""

    @property
    def disagreements(self) -> FloatArray:
        """Share of tokens of each text that differ, [texts]."""
        return self.differs.double().mean(1).numpy()

    def measurements(
        self, conditions: Mapping[str, object], command: str = ""
    ) -> list[Measurement]:
        """Return `disagreement`, `mean_layers` and `perplexity`, with 95 % intervals over the
        texts, under the conditions and those of the exits."""
        count, tokens = self.differs.shape
        facts = {
            **conditions,
            "exit_layers": list(self.exits.layers),
            "criterion": self.exits.criterion,
            "threshold": self.exits.threshold,
            "texts": count,
            "tokens": tokens,
        }
        differs, sizes = _sums(self.differs)
        losses, num_losses = _sums(self.losses)
        shown: list[tuple[str, float, str, Spread | None]] = [
            ("disagreement", _mean(self.differs), "1", clustered_wilson(differs, sizes)),
            (
                "mean_layers",
                _mean(self.depths),
                "layers/token",
                bootstrap_ratio(*_sums(self.depths)),
            ),
            (
                "perplexity",
                math.exp(_mean(self.losses)),
                "1",
                bootstrap_ratio(losses, num_losses, transform=np.exp),
            ),
        ]
        return [
            Measurement(
                name=name, value=value, unit=unit, spread=spread, conditions=facts, command=command
            )
            for name, value, unit, spread in shown
        ]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _sums(values: Tensor) -> tuple[FloatArray, FloatArray]:
    """Return the sum of each row, and its size."""
    return values.double().sum(1).numpy(), np.full(len(values), float(values.shape[1]))


def score_exits(
    model: Decoder,
    texts: Sequence[Sequence[int]],
    exits: Sequence[Exits],
    *,
    num_prompt_tokens: int,
    progress: Progress | None = None,
) -> list[ExitScores]:
    """Measure exits on texts that go on as they are, whatever the model would have written.

    Of each text the first tokens are read by all layers, as a prompt is; the others go through the
    exits, with the cache that exits leave behind: what is measured at a token contains what the
    exits of all tokens before it did.

    Args:
        model: the decoder.
        texts: token ids, all of one length, at least two more than the prompt.
        exits: to be tried; with a threshold of 1 the whole model.
        num_prompt_tokens: at least 1.
        progress: called after each text.

    Raises:
        ConfigError: exits that the model cannot have, or texts that are too short or differ in
            length.
    """
    lengths = sorted({len(text) for text in texts})
    if num_prompt_tokens < 1 or len(lengths) != 1 or lengths[0] < num_prompt_tokens + 2:
        must = f"of one length, at least 2 more than a prompt of {max(num_prompt_tokens, 1)}"
        raise ConfigError(describe("texts", "score_exits", must, f"lengths {lengths}"))
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    with measuring(model):
        for text in texts:
            found.append(_score(model, text, num_prompt_tokens, exits))
            if progress is not None:
                progress("early exit", len(found) / len(texts))
    return [
        ExitScores(each, *map(torch.stack, zip(*scores, strict=True)))
        for each, scores in zip(exits, zip(*found, strict=True), strict=True)
    ]


def _score(
    model: Decoder, text: Sequence[int], num_prompt: int, exits: Sequence[Exits]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what differs, depths and losses of a text under each of the exits."""
    tokens = torch.tensor([text], device=model.device)
    cache = model.new_cache(1, len(text))
    model(tokens[:, :num_prompt], cache=cache, last_only=True)
    rest, targets = tokens[:, num_prompt:], tokens[0, num_prompt + 1 :]
    expected = model(rest, cache=cache).logits[0].argmax(-1)
    found = []
    for each in exits:
        cache.truncate([num_prompt])
        logits, depths = forward_with_exits(model, rest, cache, each)
        losses = -target_scores(logits[0, :-1], targets)[0]
        differs = logits[0].argmax(-1) != expected
        found.append((differs.cpu(), depths[0].cpu(), losses))
    return found

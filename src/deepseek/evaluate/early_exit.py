"""What early exits lose and save on texts that are given, measured as they are used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import Condition, Progress, measuring, target_scores
from deepseek.evaluate.intervals import FloatArray, bootstrap_ratio, clustered_wilson
from deepseek.models import Decoder, Exits, forward_with_exits
from deepseek.records import Measurement, Spread


@dataclasses.dataclass(frozen=True)
class ExitScores:
    """What exits did on some texts; each array is [texts]."""

    exits: Exits
    num_tokens: int
    """Of each text, those that could leave early."""
    disagreements: FloatArray
    """Share of the tokens behind which the likeliest token is not the whole model's."""
    depths: FloatArray
    """Layers, on average over the tokens."""
    losses: FloatArray
    """Of the next tokens, in nats, on average over all but the last."""

    def measurements(
        self, conditions: dict[str, Condition], command: str = ""
    ) -> list[Measurement]:
        """Return `disagreement`, `mean_layers` and `perplexity`, with 95 % intervals over the
        texts, under the conditions and those of the exits."""
        sizes = np.full(len(self.depths), float(self.num_tokens))
        facts = {
            **conditions,
            "exit_layers": list(self.exits.layers),
            "criterion": self.exits.criterion,
            "threshold": self.exits.threshold,
            "texts": len(self.depths),
            "tokens": self.num_tokens,
        }
        loss = float(self.losses.mean())
        shown: list[tuple[str, float, str, Spread | None]] = [
            (
                "disagreement",
                float(self.disagreements.mean()),
                "1",
                clustered_wilson(self.disagreements * sizes, sizes),
            ),
            (
                "mean_layers",
                float(self.depths.mean()),
                "layers/token",
                bootstrap_ratio(self.depths * sizes, sizes),
            ),
            (
                "perplexity",
                math.exp(loss),
                "1",
                bootstrap_ratio(self.losses * sizes, sizes, transform=np.exp),
            ),
        ]
        return [
            Measurement(
                name=name, value=value, unit=unit, spread=spread, conditions=facts, command=command
            )
            for name, value, unit, spread in shown
        ]


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
    num_tokens = (lengths[0] if lengths else 0) - num_prompt_tokens
    if len(lengths) != 1 or num_prompt_tokens < 1 or num_tokens < 2:
        must = f"of one length, at least 2 more than a prompt of {max(num_prompt_tokens, 1)}"
        raise ConfigError(describe("texts", "score_exits", must, f"lengths {lengths}"))
    found: list[list[tuple[float, float, float]]] = []
    with measuring(model):
        for text in texts:
            found.append(_score(model, text, num_prompt_tokens, exits))
            if progress is not None:
                progress("early exit", len(found) / len(texts))
    return [
        ExitScores(each, num_tokens, *np.array(scores).T)
        for each, scores in zip(exits, zip(*found, strict=True), strict=True)
    ]


def _score(
    model: Decoder, text: Sequence[int], num_prompt: int, exits: Sequence[Exits]
) -> list[tuple[float, float, float]]:
    """Return disagreement, depth and loss of a text under each of the exits."""
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
        found.append((_mean(logits[0].argmax(-1) != expected), _mean(depths), _mean(losses)))
    return found


def _mean(values: Tensor) -> float:
    return float(values.double().mean())

"""How the tokens of one request are chosen: bias, grammar, then the steps of `Sampling`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from deepseek.generate.batch import row_generator
from deepseek.ops.sampling.native import RowChooser
from deepseek.serve.executor import Matcher
from deepseek.serve.generation import GenerationRequest, TokenChoice


class Sampler:
    """Chooses the tokens of one request; its choices depend on nothing else in the batch.

    A sampler draws one random number for each token that it chooses, so an answer with a seed is
    the same with drafts and without.

    Args:
        request: what is asked for.
        vocab_size: of the logits.
        end_token_ids: tokens that end a text, which wait until `min_tokens` are there.
        matcher: of the request's grammar.
        instruction_set: whose kernels choose.
    """

    def __init__(
        self,
        request: GenerationRequest,
        vocab_size: int,
        end_token_ids: Iterable[int],
        matcher: Matcher | None = None,
        *,
        instruction_set: str,
    ) -> None:
        self._sampling, self._matcher = request.sampling, matcher
        self._num_top = request.logprobs or 0
        self._biased = np.fromiter(request.logit_bias, np.int64)
        self._bias = np.fromiter(request.logit_bias.values(), np.float32)
        self._ends = np.fromiter(end_token_ids, np.int64)
        self._tokens_before_end = request.min_tokens
        self._chooser = RowChooser(
            request.sampling,
            request.prompt,
            vocab_size,
            row_generator(request.sampling.seed, 0),
            instruction_set=instruction_set,
        )

    @property
    def changes_logits(self) -> bool:
        """Whether it chooses from other logits than the model's own."""
        asked = self._matcher is not None or self._bias.size > 0 or self._tokens_before_end > 0
        return asked or self._sampling.has_penalties

    def choose(
        self, logits: np.ndarray, largest: int, certainty: tuple[float, float]
    ) -> TokenChoice | None:
        """Return the next token, or None where the logits are not finite.

        Args:
            logits: float32 [V]; changed.
            largest: the place of its largest logit.
            certainty: the logarithm of the sum of its exponentials, and the entropy.

        Raises:
            CapacityError: the grammar became too costly on the way.
        """
        changes = self.changes_logits
        shown = logits.copy() if changes else logits
        is_simple = self._sampling.is_greedy and not changes
        token = largest if is_simple else self._draw(logits)
        if not math.isfinite(logits[token]) or not math.isfinite(certainty[0]):
            return None
        self._take(token)
        return describe_choice(shown, token, self._num_top, certainty)

    def _draw(self, logits: np.ndarray) -> int:
        logits[self._biased] += self._bias
        if self._tokens_before_end > 0:
            logits[self._ends] = -np.inf
        if self._matcher is not None:
            self._matcher.mask(logits)
        return self._chooser.choose(logits)

    def _take(self, token: int) -> None:
        self._tokens_before_end -= 1
        if self._matcher is not None:
            self._matcher.take(token)
        self._chooser.take(token)


def describe_choice(
    logits: np.ndarray, token: int, num_top: int, certainty: tuple[float, float]
) -> TokenChoice:
    """Return a token with its logprob and those of the most probable ones.

    Args:
        logits: float32 [V], as the model gave them.
        token: the one that was chosen.
        num_top: how many of the most probable ones.
        certainty: the logarithm of the sum of their exponentials, and the entropy.
    """
    log_sum, entropy = certainty
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        places = np.argpartition(-logits, num_top)[:num_top]
        places = places[np.lexsort((places, -logits[places]))]
        top = tuple((int(place), float(logits[place]) - log_sum) for place in places)
    return TokenChoice(token, float(logits[token]) - log_sum, top, entropy)

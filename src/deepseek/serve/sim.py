"""An executor without a model: it remembers tokens, costs virtual time, and finds any fault."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence

from deepseek.errors import ConfigError, VerifyError, describe
from deepseek.serve.core.chain import Root
from deepseek.serve.core.request import PageCopy, Request, Work
from deepseek.serve.executor import Matcher, Result
from deepseek.serve.generation import GenerationRequest, TokenChoice

Language = Callable[[Sequence[int]], int]
"""Says which token follows a text."""

TOP_LOGPROBS = (-0.2, -2.0, -3.0)
"""Of the chosen token and of those behind it; further ones fall by one each."""


class VirtualClock:
    """A time that passes when it is told to."""

    def __init__(self, now_s: float = 0.0) -> None:
        """Start at a time."""
        self.now_s = now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


def hashed_language(vocab_size: int) -> Language:
    """Return a language in which the next token depends on every token before it."""

    def follow(tokens: Sequence[int]) -> int:
        digest = hashlib.blake2b(array("q", tokens).tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % vocab_size

    return follow


class SimExecutor:
    """Executes work with no weights, and checks the scheduler while it does.

    It remembers which token stands at each place of each page and whose the page is, as a cache of
    keys and values would, rebuilds every text from its pages alone, and raises if it is not the
    request's. The next token is a function of the rebuilt text, so that a fault in the handling of
    pages breaks or changes an answer. A step costs `base_s + token_s * tokens` seconds, which it
    spends by calling `spend`: `VirtualClock.advance`, or `time.sleep` to be a model in real time.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_step_tokens: int,
        context: int,
        vocab_size: int,
        spend: Callable[[float], None],
        language: Language | None = None,
        base_s: float = 0.004,
        token_s: float = 0.001,
    ) -> None:
        """Make empty pages.

        Args:
            num_pages: pages there are.
            page_size: tokens that a page holds.
            max_step_tokens: most tokens of a step.
            context: most tokens of a text.
            vocab_size: tokens there are.
            spend: lets time pass.
            language: says which token follows a text; without one, `hashed_language` does.
            base_s: seconds of a step besides those of its tokens.
            token_s: seconds of each token.

        Raises:
            ConfigError: a number is too small.
        """
        counts = {"num_pages": num_pages, "page_size": page_size, "context": context}
        counts |= {"max_step_tokens": max_step_tokens, "vocab_size": vocab_size}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(describe(name, "SimExecutor", "at least 1", value))
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_step_tokens = max_step_tokens
        self.context = context
        self.num_tokens_computed = 0
        self.vocab_size = vocab_size
        self.least_copied = 1
        self._language = language or hashed_language(vocab_size)
        self._spend = spend
        self._base_s = base_s
        self._token_s = token_s
        self._tokens = array("q", [-1]) * (num_pages * page_size)
        self._roots: list[Root | None] = [None] * num_pages
        self._open: dict[str, GenerationRequest] = {}

    @property
    def num_open(self) -> int:
        """Requests that were opened and not closed."""
        return len(self._open)

    def open(
        self, request_id: str, generation: GenerationRequest, matcher: Matcher | None = None
    ) -> None:
        """Take note of what is wanted with each token of a request; grammars are not followed."""
        self._open[request_id] = generation

    def close(self, request_id: str) -> None:
        """Forget a request."""
        self._open.pop(request_id, None)

    def execute(self, work: Sequence[Work], copies: Sequence[PageCopy] = ()) -> list[Result]:
        """Return what was chosen for each work; see `Executor`.

        Raises:
            VerifyError: the step is too large, a page is written by two, a request is not open, or
                the text in its pages is not its own.
        """
        num_tokens = sum(len(item.tokens) for item in work)
        if num_tokens > self.max_step_tokens:
            raise VerifyError(f"a step of {num_tokens} tokens; at most {self.max_step_tokens}")
        self._check_writers(work)
        size = self.page_size
        for target, source in copies:
            part = self._tokens[source * size : (source + 1) * size]
            self._tokens[target * size : (target + 1) * size] = part
            self._roots[target] = self._roots[source]
        for item in work:
            self._write(item)
        chosen = [self._choose(item) for item in work]
        self.num_tokens_computed += num_tokens
        self._spend(self._base_s + self._token_s * num_tokens)
        return [Result(tuple(tokens)) for tokens in chosen]

    def _check_writers(self, work: Sequence[Work]) -> None:
        readers: dict[int, int] = {}
        for item in work:
            for page in item.pages:
                readers[page] = readers.get(page, 0) + 1
        for item in work:
            if item.request.id not in self._open:
                raise VerifyError(f"request {item.request.id} is not open")
            for page in item.pages[item.start // self.page_size :]:
                if readers[page] > 1:
                    raise VerifyError(f"page {page} is written while another request has it")

    def _write(self, item: Work) -> None:
        end = item.start + len(item.tokens)
        if end > len(item.pages) * self.page_size or not item.tokens:
            raise VerifyError(
                f"request {item.request.id}: {len(item.pages)} pages for {len(item.tokens)} tokens "
                f"up to {end}"
            )
        for place, token in enumerate(item.tokens, start=item.start):
            page, offset = item.pages[place // self.page_size], place % self.page_size
            if offset == 0:
                self._roots[page] = _root_of(item.request)
            self._tokens[page * self.page_size + offset] = token

    def _choose(self, item: Work) -> list[TokenChoice]:
        end = item.start + len(item.tokens)
        text = self._read(item)[:end]
        request = item.request
        expected = [*request.tokens[: end - item.num_drafts], *request.drafts]
        if text != expected:
            raise VerifyError(f"the pages of request {request.id} do not hold its text")
        if not item.is_choosing:
            return []
        del text[end - item.num_drafts :]
        chosen: list[TokenChoice] = []
        for guess in (*request.drafts, None):
            token = self._language(text)
            chosen.append(self._describe(token, self._open[request.id]))
            if token != guess:
                break
            text.append(token)
        return chosen

    def _read(self, item: Work) -> list[int]:
        """Return the text that a request's pages hold."""
        text: list[int] = []
        for page in item.pages:
            if self._roots[page] != _root_of(item.request):
                raise VerifyError(f"request {item.request.id} reads page {page} of somebody else")
            text.extend(self._tokens[page * self.page_size : (page + 1) * self.page_size])
        return text

    def _describe(self, token: int, generation: GenerationRequest) -> TokenChoice:
        if generation.logprobs is None:
            return TokenChoice(token)
        top = tuple(
            ((token + place) % self.vocab_size, TOP_LOGPROBS[min(place, 2)] - max(place - 2, 0))
            for place in range(generation.logprobs)
        )
        return TokenChoice(token, TOP_LOGPROBS[0], top)


def _root_of(request: Request) -> Root:
    return Root(request.tenant, request.adapter)

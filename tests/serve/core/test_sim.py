"""The executor without a model: deterministic, and merciless about pages."""

from __future__ import annotations

import pytest

from deepseek.errors import ConfigError, VerifyError
from deepseek.serve.core.request import Request, Work
from deepseek.serve.executor import Executor
from deepseek.serve.generation import GenerationRequest, TokenChoice
from deepseek.serve.sim import SimExecutor, VirtualClock, hashed_language


def executor_of(clock: VirtualClock | None = None, **sizes: int) -> SimExecutor:
    """Return an executor with eight pages of four tokens, and a request `r` open."""
    given = {"num_pages": 8, "page_size": 4, "max_step_tokens": 16, "context": 32, **sizes}
    spend = (clock or VirtualClock()).advance
    executor = SimExecutor(**given, vocab_size=50, spend=spend)  # pyright: ignore
    executor.open("r", GenerationRequest(prompt=(1,), max_tokens=4))
    return executor


def request_of(*tokens: int, **fields: str) -> Request:
    """Return the request `r`."""
    return Request(id="r", prompt=tokens, max_tokens=4, **fields)  # pyright: ignore


def work_of(request: Request, start: int, count: int, pages: tuple[int, ...]) -> Work:
    """Return work on the next `count` tokens, with the request's guesses behind them."""
    tokens = (*request.tokens[start : start + count], *request.drafts)
    return Work(request, start, tokens, len(request.drafts), pages)


def run(executor: SimExecutor, work: Work) -> tuple[TokenChoice, ...]:
    """Return the tokens that one work gives."""
    (result,) = executor.execute([work])
    return result.tokens


def test_it_is_an_executor() -> None:
    executor: Executor = executor_of()
    assert (executor.page_size, executor.num_pages) == (4, 8)


def test_next_token_depends_on_the_whole_text_and_not_on_the_chunks() -> None:
    whole, parts = executor_of(), executor_of()
    request = request_of(*range(10))
    at_once = run(whole, work_of(request, 0, 10, (0, 1, 2)))
    assert run(parts, work_of(request, 0, 6, (5, 3))) == ()
    in_two = run(parts, work_of(request, 6, 4, (5, 3, 7)))
    assert at_once == in_two
    assert at_once[0].token_id == hashed_language(50)(range(10))


def test_time_passes_by_the_cost_of_the_step() -> None:
    clock = VirtualClock(5.0)
    executor_of(clock).execute([work_of(request_of(1, 2, 3), 0, 3, (0,))])
    assert clock.now_s == pytest.approx(5.0 + 0.004 + 3 * 0.001)


def test_guesses_are_checked_up_to_the_first_wrong_one() -> None:
    language = hashed_language(50)
    text = [1, 2, 3]
    for _ in range(4):
        text.append(language(text))
    for num_right in range(4):
        request = request_of(1, 2, 3)
        request.drafts = text[3 : 3 + num_right] + [49 - text[3 + num_right]] * (3 - num_right)
        chosen = run(executor_of(), work_of(request, 0, 3, (4, 2)))
        assert [choice.token_id for choice in chosen] == text[3 : 4 + num_right]


def test_wrong_guesses_are_written_over() -> None:
    executor, request = executor_of(), request_of(1, 2, 3)
    request.drafts = [99, 99]
    (choice,) = run(executor, work_of(request, 0, 3, (0, 1)))
    request.tokens.append(choice.token_id)
    request.drafts = []
    (after,) = run(executor, work_of(request, 3, 1, (0,)))
    assert after.token_id == hashed_language(50)(request.tokens)


def test_logprobs_are_given_where_asked_for() -> None:
    executor = executor_of()
    executor.open("r", GenerationRequest(prompt=(1,), max_tokens=4, logprobs=4))
    (choice,) = run(executor, work_of(request_of(1), 0, 1, (0,)))
    assert choice.top[0] == (choice.token_id, choice.logprob)
    values = [value for _, value in choice.top]
    assert len(choice.top) == 4 and values == sorted(values, reverse=True)
    assert all(0 <= token < 50 for token, _ in choice.top)
    executor.open("r", GenerationRequest(prompt=(1,), max_tokens=4, logprobs=0))
    (choice,) = run(executor, work_of(request_of(1), 0, 1, (0,)))
    assert choice.top == () and choice.logprob is not None


def test_swapped_pages_are_found() -> None:
    executor, request = executor_of(), request_of(*range(10))
    executor.execute([work_of(request, 0, 8, (0, 1))])
    with pytest.raises(VerifyError, match="do not hold its text"):
        executor.execute([work_of(request, 8, 2, (1, 0, 2))])


def test_skipped_tokens_are_found() -> None:
    executor, request = executor_of(), request_of(*range(7))
    executor.execute([work_of(request, 0, 3, (0,))])
    with pytest.raises(VerifyError, match="do not hold its text"):
        executor.execute([work_of(request, 4, 3, (0, 1))])


@pytest.mark.parametrize("other", [{"tenant": "bob"}, {"adapter": "lora"}])
def test_pages_of_another_root_are_found(other: dict[str, str]) -> None:
    executor, request = executor_of(), request_of(*range(4))
    executor.execute([work_of(request, 0, 4, (0,))])
    with pytest.raises(VerifyError, match="somebody else"):
        executor.execute([work_of(request_of(*range(6), **other), 4, 2, (0, 1))])


def test_page_written_by_two_is_found() -> None:
    executor = executor_of()
    executor.open("s", GenerationRequest(prompt=(1,), max_tokens=4))
    other = Request(id="s", prompt=(1, 2), max_tokens=4)
    works = [work_of(request_of(1, 2), 0, 2, (3,)), work_of(other, 0, 2, (3,))]
    with pytest.raises(VerifyError, match="page 3 is written"):
        executor.execute(works)


def test_step_that_is_too_large_is_found() -> None:
    with pytest.raises(VerifyError, match="17 tokens"):
        executor_of().execute([work_of(request_of(*range(17)), 0, 17, (0, 1, 2, 3, 4))])


@pytest.mark.parametrize(("count", "pages"), [(5, (0,)), (0, (0,))])
def test_work_that_does_not_fit_is_found(count: int, pages: tuple[int, ...]) -> None:
    with pytest.raises(VerifyError, match="pages for"):
        executor_of().execute([work_of(request_of(*range(6)), 0, count, pages)])


def test_closed_request_is_not_served() -> None:
    executor = executor_of()
    executor.close("r")
    executor.close("r")
    assert executor.num_open == 0
    with pytest.raises(VerifyError, match="not open"):
        executor.execute([work_of(request_of(1), 0, 1, (0,))])


@pytest.mark.parametrize("name", ["num_pages", "page_size", "max_step_tokens", "context"])
def test_sizes_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        executor_of(**{name: 0})

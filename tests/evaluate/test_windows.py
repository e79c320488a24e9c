"""Windows score every token once, in context."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.evaluate.windows import plan_windows, window_batches


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int]:
    """Return tokens, window and stride."""
    window = draw(st.integers(2, 70))
    return draw(st.integers(0, 300)), window, draw(st.integers(1, window - 1))


@given(cases())
def test_each_token_is_scored_exactly_once(case: tuple[int, int, int]) -> None:
    num_tokens, window, stride = case
    windows = plan_windows(num_tokens, window, stride)
    scored = [place for each in windows for place in range(each.scored, each.end)]
    assert scored == list(range(1, num_tokens))


@given(cases())
def test_windows_are_bounded_and_give_context(case: tuple[int, int, int]) -> None:
    num_tokens, window, stride = case
    for number, each in enumerate(plan_windows(num_tokens, window, stride)):
        assert 2 <= each.end - each.begin <= window
        assert each.scored > each.begin
        if number > 0:
            assert each.scored - each.begin >= window - stride


@given(cases(), st.one_of(st.none(), st.integers(1, 5)))
def test_batches_keep_order_and_shape(case: tuple[int, int, int], batch_size: int | None) -> None:
    windows = plan_windows(*case)
    batches = list(window_batches(windows, batch_size))
    assert [each for batch, _ in batches for each in batch] == windows
    assert all(each.shape == shape for batch, shape in batches for each in batch)
    assert all(len(batch) <= (batch_size or 2048) for batch, _ in batches)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (8, 0), (8, 9)])
def test_impossible_windows_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        plan_windows(100, window, stride)

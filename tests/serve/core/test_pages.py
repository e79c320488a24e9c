"""Pages: found by what they hold, shared within a tenant, evicted fairly, never lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import CapacityError, ConfigError, VerifyError
from deepseek.serve.core.chain import Chain, Root, page_hash
from deepseek.serve.core.pages import Beginning, PagePool

ANN = Root("ann", None)
BOB = Root("bob", None)


def compute(pool: PagePool, root: Root, tokens: list[int]) -> tuple[Chain, list[int]]:
    """Let a request compute a text, reusing what is cached; return its chain and pages."""
    chain = Chain(root)
    pages = pool.match(chain, tokens)
    pool.share(chain, pages)
    pages += pool.allocate(pool.pages_for(len(tokens)) - len(pages))
    pool.publish(chain, tokens, pages, len(tokens))
    return chain, pages


def leave(pool: PagePool, root: Root, tokens: list[int]) -> list[int]:
    """Let a request compute a text and go; return the pages it had."""
    _, pages = compute(pool, root, tokens)
    pool.release(pages)
    return pages


def found(pool: PagePool, root: Root, tokens: list[int]) -> list[int]:
    """Return the pages that a new request of a root would find."""
    return pool.match(Chain(root), tokens)


def text(start: int, length: int) -> list[int]:
    """Return a text that no other start has."""
    return list(range(start, start + length))


def test_longest_prefix_of_full_pages_is_found() -> None:
    pool = PagePool(8, 4)
    pages = leave(pool, ANN, text(0, 11))
    assert found(pool, ANN, text(0, 11)) == pages[:2]
    assert found(pool, ANN, [*text(0, 8), 99, 98]) == pages[:2]
    assert found(pool, ANN, [*text(0, 7), 99, 98]) == pages[:1]
    assert found(pool, ANN, text(1, 11)) == []


def test_the_last_token_is_never_found() -> None:
    pool = PagePool(8, 4)
    pages = leave(pool, ANN, text(0, 8))
    assert found(pool, ANN, text(0, 8)) == pages[:1]
    assert found(pool, ANN, text(0, 9)) == pages


def test_tail_that_is_not_full_is_not_published() -> None:
    pool = PagePool(8, 4)
    leave(pool, ANN, text(0, 3))
    assert pool.num_cached == 0
    assert list(pool.published()) == []


@pytest.mark.parametrize("other", [BOB, Root("ann", "lora"), Root("", None), Root("ann", "")])
def test_nobody_finds_pages_of_another_root(other: Root) -> None:
    pool = PagePool(8, 4)
    leave(pool, ANN, text(0, 9))
    assert found(pool, other, text(0, 9)) == []
    assert len(found(pool, ANN, text(0, 9))) == 2
    pages = leave(pool, other, text(0, 9))
    assert found(pool, other, text(0, 9)) == pages[:2]


def test_pages_are_shared_while_in_use_and_counted() -> None:
    pool = PagePool(8, 4)
    _, first = compute(pool, ANN, text(0, 9))
    _, second = compute(pool, ANN, text(0, 9))
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert pool.num_users(first[0]) == 2
    pool.release(first)
    assert pool.num_users(first[0]) == 1
    assert pool.num_free == 8 - 3
    pool.release(second)
    assert pool.num_free == 8


def test_pages_computed_twice_at_once_are_published_once() -> None:
    pool = PagePool(8, 4)
    one, two = Chain(ANN), Chain(ANN)
    ones, twos = pool.allocate(2), pool.allocate(2)
    pool.publish(one, text(0, 8), ones, 8)
    pool.publish(two, text(0, 8), twos, 8)
    assert found(pool, ANN, text(0, 9)) == ones
    twos += pool.allocate(1)
    pool.publish(two, text(0, 12), twos, 12)
    assert found(pool, ANN, text(0, 13)) == [*ones, twos[2]]
    pool.release(twos)
    assert pool.num_cached == 1


def test_a_text_whose_published_head_was_evicted_publishes_its_own_copy() -> None:
    pool = PagePool(6, 4)
    one, two = Chain(ANN), Chain(ANN)
    ones, twos = pool.allocate(2), pool.allocate(2)
    pool.publish(one, text(0, 8), ones, 8)
    pool.publish(two, text(0, 8), twos, 8)
    pool.release(ones)
    pool.release(pool.allocate(4))
    assert found(pool, ANN, text(0, 9)) == []
    twos += pool.allocate(1)
    pool.publish(two, text(0, 12), twos, 12)
    assert found(pool, ANN, text(0, 13)) == twos


def test_tails_are_evicted_before_heads_and_old_before_new() -> None:
    pool = PagePool(4, 4)
    old, new = leave(pool, ANN, text(0, 8)), leave(pool, ANN, text(100, 8))
    assert pool.allocate(1) == [old[1]]
    assert found(pool, ANN, text(0, 9)) == old[:1]
    assert pool.allocate(1) == [old[0]]
    assert found(pool, ANN, text(100, 9)) == new
    assert pool.num_evicted == 2


def test_a_hit_makes_pages_new_again() -> None:
    pool = PagePool(4, 4)
    old, new = leave(pool, ANN, text(0, 8)), leave(pool, ANN, text(100, 8))
    chain = Chain(ANN)
    pool.share(chain, pool.match(chain, text(0, 9)))
    pool.release(old)
    assert set(pool.allocate(2)) == set(new)


def test_blank_pages_go_before_cached_ones() -> None:
    pool = PagePool(5, 4)
    cached = leave(pool, ANN, text(0, 8))
    assert not set(pool.allocate(3)) & set(cached)
    assert pool.num_evicted == 0


def test_one_who_floods_evicts_himself() -> None:
    """Attack 23: a small tenant's pages stay while another one floods the cache."""
    pool = PagePool(16, 4)
    leave(pool, BOB, text(0, 12))
    for place in range(100):
        leave(pool, ANN, text(1000 * place + 1000, 16))
    assert len(found(pool, BOB, text(0, 13))) == 3
    assert pool.num_cached_of("bob") == 3
    assert pool.num_cached_of("ann") == 13


def test_the_largest_of_several_tenants_loses_first() -> None:
    pool = PagePool(9, 4)
    leave(pool, Root("c", None), text(0, 8))
    leave(pool, ANN, text(100, 16))
    leave(pool, BOB, text(200, 12))
    pool.allocate(3)
    assert [pool.num_cached_of(name) for name in ("c", "ann", "bob")] == [2, 2, 2]


def test_hash_that_always_collides_is_harmless() -> None:
    """Attack 22: what is found is compared token by token, and behind the same page."""
    pool = PagePool(8, 4, lambda before, content: b"same")
    pages = leave(pool, ANN, text(0, 12))
    assert found(pool, ANN, text(0, 13)) == pages[:1]
    assert found(pool, BOB, text(0, 13)) == []
    assert found(pool, ANN, text(50, 13)) == []
    leave(pool, BOB, text(50, 12))
    assert found(pool, BOB, text(50, 13)) == []
    assert pool.num_free == 8


def test_equal_page_behind_another_page_is_not_found() -> None:
    """A hash of the content alone would take the second page of one text for another's."""
    pool = PagePool(8, 4, lambda before, content: content)
    leave(pool, ANN, [1, 1, 1, 1, 7, 7, 7, 7])
    assert found(pool, ANN, [2, 2, 2, 2, 7, 7, 7, 7, 0]) == []
    leave(pool, ANN, [2, 2, 2, 2, 7, 7, 7, 7])
    assert len(found(pool, ANN, [2, 2, 2, 2, 7, 7, 7, 7, 0])) == 1


def test_forgotten_pages_are_found_by_nobody() -> None:
    """Attack 26: what was computed behind a bad page is as bad."""
    pool = PagePool(8, 4)
    _, bad = compute(pool, ANN, text(0, 8))
    chain, other = compute(pool, ANN, text(0, 12))
    pool.forget(bad[:1])
    assert found(pool, ANN, text(0, 13)) == []
    other += pool.allocate(1)
    pool.publish(chain, text(0, 16), other, 16)
    assert found(pool, ANN, text(0, 17)) == []
    pool.release(bad)
    pool.release(other)
    assert pool.num_free == 8
    assert pool.num_cached == 0
    again = leave(pool, ANN, text(0, 8))
    assert found(pool, ANN, text(0, 9)) == again


def begun(pool: PagePool, root: Root, tokens: list[int]) -> Beginning | None:
    """Return the page that a new request of a root would begin its own page with."""
    chain = Chain(root)
    return pool.beginning(chain, pool.match(chain, tokens), tokens)


def test_the_page_with_most_in_common_is_copied() -> None:
    pool = PagePool(16, 4, least_copied=2)
    first = leave(pool, ANN, [1, 2, 3, 4, 5, 6, 7, 8])
    second = leave(pool, ANN, [1, 2, 3, 9, 5])
    assert begun(pool, ANN, [1, 2, 3, 0, 0]) == (second[0], 3)  # the newest of equals
    assert begun(pool, ANN, [1, 2, 3, 4, 5, 6, 0, 0]) == (first[1], 2)
    assert begun(pool, ANN, [1, 2, 3, 4, 5, 6]) is None  # the last token is computed
    assert begun(pool, ANN, [1, 0, 0]) is None
    assert begun(pool, ANN, [1, 2, 3]) == (second[0], 2)
    for other in (BOB, Root("ann", "lora")):
        assert begun(pool, other, [1, 2, 3, 4, 5, 6, 0, 0]) is None
    pool.allocate(16)
    assert begun(pool, ANN, [1, 2, 3, 4, 5, 6, 0, 0]) is None
    with_none = PagePool(4, 4)
    leave(with_none, ANN, text(0, 5))
    assert begun(with_none, ANN, [0, 1, 2, 99]) is None


def test_a_copy_of_a_page_that_is_not_trusted_is_as_bad() -> None:
    """And so is the copy of a copy, and what was computed behind them."""
    pool = PagePool(16, 4, least_copied=1)
    _, bad = compute(pool, ANN, text(0, 5))
    texts = [[0, 1, 2, 20, *text(21, 5)], [0, 1, 2, 20, 21, 22, 40, *text(41, 5)]]
    for tokens in texts:
        chain = Chain(ANN)
        pages = pool.match(chain, tokens)
        source = pool.beginning(chain, pages, tokens)
        assert source is not None
        pool.share(chain, pages)
        fresh = pool.allocate(pool.pages_for(len(tokens)) - len(pages))
        pool.copied(fresh[0], source.page)
        pool.publish(chain, tokens, pages + fresh, len(tokens))
        assert len(found(pool, ANN, [*tokens, 0])) == len(tokens) // 4
    pool.forget(bad)
    for tokens in texts:
        assert found(pool, ANN, [*tokens, 0]) == []
    again = leave(pool, ANN, [0, 1, 2, 20, 5])
    assert found(pool, ANN, [0, 1, 2, 20, 5]) == again[:1]


def test_a_page_that_is_handed_out_again_is_no_copy_any_more() -> None:
    pool = PagePool(8, 4, least_copied=1)
    _, source = compute(pool, ANN, text(0, 4))
    (page,) = pool.allocate(1)
    pool.copied(page, source[0])
    pool.release([page])
    chain, tokens, pages = Chain(BOB), text(50, 4), pool.allocate(1)
    assert pages == [page]
    pool.publish(chain, tokens, pages, 4)
    pool.forget(source)
    assert found(pool, BOB, [*tokens, 0]) == pages


def test_forgetting_cached_pages_frees_them() -> None:
    pool = PagePool(4, 4)
    pages = leave(pool, ANN, text(0, 12))
    pool.forget(pages[1:2])
    assert found(pool, ANN, text(0, 13)) == pages[:1]
    assert pool.num_free == 4
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_more_than_is_free_is_refused() -> None:
    pool = PagePool(2, 4)
    pool.allocate(1)
    with pytest.raises(CapacityError, match="1 free pages"):
        pool.allocate(2)


def test_page_that_nobody_uses_is_not_released() -> None:
    pool = PagePool(2, 4)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(VerifyError):
        pool.release(pages)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_empty_pool_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        PagePool(*sizes)


def test_misses_cost_one_digest_a_page_and_no_comparison() -> None:
    """At no hits at all the cache costs a digest of each full page, once, and nothing else."""
    num_digests = 0

    def counted(before: bytes, content: bytes) -> bytes:
        nonlocal num_digests
        num_digests += 1
        return page_hash(before, content)

    pool = PagePool(64, 16, counted)
    for place in range(50):
        tokens = text(10_000 * place, 16 * 20 + 5)
        chain = Chain(ANN)
        assert pool.match(chain, tokens) == []
        assert num_digests == 20 * place + 1
        pages = pool.allocate(21)
        for end in range(0, len(tokens), 7):
            pool.publish(chain, tokens, pages, end)
        pool.publish(chain, tokens, pages, len(tokens))
        pool.release(pages)
        assert num_digests == 20 * (place + 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=60))
def test_eviction_takes_the_oldest_of_the_largest(uses: list[tuple[str, int]]) -> None:
    """Compared with a plain list, oldest first, that is searched in full."""
    pool = PagePool(7, 1)
    cached: list[tuple[str, int]] = []
    for use in uses:
        root, tokens = Root(use[0], None), [use[1], 0]
        hits = found(pool, root, tokens)
        assert bool(hits) == (use in cached)
        chain = Chain(root)
        pool.share(chain, pool.match(chain, tokens))
        pages = hits or pool.allocate(1)
        pool.publish(chain, tokens, pages, 1)
        pool.release(pages)
        if use in cached:
            cached.remove(use)
        elif len(cached) == 7:
            sizes = {name: sum(name == other for other, _ in cached) for name, _ in cached}
            gone = {item for item in cached if not found(pool, Root(item[0], None), [item[1], 0])}
            (victim,) = gone
            assert sizes[victim[0]] == max(sizes.values())
            assert victim == next(item for item in cached if item[0] == victim[0])
            cached.remove(victim)
        cached.append(use)

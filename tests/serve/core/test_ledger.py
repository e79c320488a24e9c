"""The ledger finds every planted fault, and measures what is reserved and unused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deepseek.errors import VerifyError
from deepseek.serve.core import ledger
from deepseek.serve.core.request import Request
from tests.serve.core.simulation import Simulation


def busy() -> tuple[Simulation, Request, Request]:
    """Return a machine where two tenants run, two requests share a prefix, and one waits."""
    sim = Simulation(num_pages=20, max_running=3, context=40)
    ann = sim.add(range(10), 20, tenant="ann")
    sim.step()
    sim.add(range(10), 20, tenant="ann")
    bob = sim.add(range(9), 20, tenant="bob")
    sim.add(range(9), 20, tenant="bob")
    for _ in range(4):
        sim.step()
    sim.scheduler.cancel(sim.scheduler.running[1].id)
    ledger.check(sim.scheduler)
    return sim, ann, bob


def lose_a_page(sim: Simulation, ann: Request, bob: Request) -> None:
    sim.pool.allocate(1)


def drop_a_page(sim: Simulation, ann: Request, bob: Request) -> None:
    del ann.pages[-1]


def take_a_page_of_another(sim: Simulation, ann: Request, bob: Request) -> None:
    bob.pages[-1] = ann.pages[-1]


def share_across_tenants(sim: Simulation, ann: Request, bob: Request) -> None:
    sim.pool.release(bob.pages[:1])
    bob.pages[0] = ann.pages[0]
    sim.pool._refs[ann.pages[0]] += 1


def release_too_early(sim: Simulation, ann: Request, bob: Request) -> None:
    sim.pool.release(ann.pages)


def compute_beyond_the_pages(sim: Simulation, ann: Request, bob: Request) -> None:
    ann.tokens.extend([0] * 30)
    ann.num_computed += 25


def compute_beyond_the_text(sim: Simulation, ann: Request, bob: Request) -> None:
    ann.num_computed = len(ann.tokens)


def publish_other_tokens(sim: Simulation, ann: Request, bob: Request) -> None:
    entry = sim.pool.cached(ann.pages[0])
    assert entry is not None
    entry.tokens = (9, 9, 9, 9)


def change_the_text(sim: Simulation, ann: Request, bob: Request) -> None:
    ann.tokens[0] += 1


def write_to_a_published_page(sim: Simulation, ann: Request, bob: Request) -> None:
    ann.num_computed = 6


def publish_behind_an_evicted_page(sim: Simulation, ann: Request, bob: Request) -> None:
    entry = sim.pool.cached(ann.pages[1])
    assert entry is not None and entry.parent is not None
    entry.parent.is_published = False


def free_a_page_twice(sim: Simulation, ann: Request, bob: Request) -> None:
    sim.pool._blank.append(sim.pool.blank_pages()[0])


def hold_pages_while_waiting(sim: Simulation, ann: Request, bob: Request) -> None:
    sim.scheduler.waiting[0].pages = [0]


def publish_a_part_of_a_page(sim: Simulation, ann: Request, bob: Request) -> None:
    entry = sim.pool.cached(ann.pages[0])
    assert entry is not None
    entry.tokens = entry.tokens[:3]


FAULTS = [
    lose_a_page,
    drop_a_page,
    take_a_page_of_another,
    share_across_tenants,
    release_too_early,
    compute_beyond_the_pages,
    compute_beyond_the_text,
    publish_other_tokens,
    change_the_text,
    write_to_a_published_page,
    publish_behind_an_evicted_page,
    free_a_page_twice,
    hold_pages_while_waiting,
    publish_a_part_of_a_page,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_is_found(fault: Callable[[Simulation, Request, Request], None]) -> None:
    sim, ann, bob = busy()
    fault(sim, ann, bob)
    with pytest.raises(VerifyError):
        ledger.check(sim.scheduler)


def test_waste_is_counted_in_positions() -> None:
    sim = Simulation(num_pages=20, page_size=4, context=40)
    sim.add(range(10), 20)
    sim.step()
    sim.add(range(10), 20)
    sim.step()
    waste = ledger.waste(sim.scheduler)
    # the first holds 11 tokens on 3 pages; the second shares two of them and fills 2 of a third
    assert (waste.held, waste.reserved) == (11 + 2, 16)
    assert waste.share == pytest.approx(3 / 16)
    assert (waste.held_unshared, waste.contiguous) == (21, 80)
    assert waste.contiguous_share == pytest.approx(59 / 80)


def test_nothing_wasted_by_nobody() -> None:
    waste = ledger.waste(Simulation().scheduler)
    assert (waste.share, waste.contiguous_share) == (0, 0)

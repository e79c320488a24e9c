"""Who comes first: priority, then a fair share for every tenant, then arrival."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator

from deepseek.serve.core.chain import Chain, Root
from deepseek.serve.core.request import Phase, Request

Rank = tuple[int, float, int]
"""Priority, arrival, number of the arrival: the lower the better. It never changes, so the best
request of all is never turned back and always gets on."""


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
    """A request with what the scheduler notes about it."""

    request: Request
    rank: Rank
    chain: Chain = dataclasses.field(init=False)
    computing: list[bytes] = dataclasses.field(default_factory=list[bytes], init=False)
    """Digests of the pages of its prompt that it is to publish."""

    def __post_init__(self) -> None:
        self.chain = Chain(Root(self.request.tenant, self.request.adapter))

    @property
    def tenant(self) -> str:
        """Who pays."""
        return self.request.tenant

    @property
    def num_wanted(self) -> int:
        """Tokens that its pages do not hold yet."""
        return len(self.request.tokens) - self.request.num_computed

    @property
    def is_running(self) -> bool:
        """Whether it holds pages and is to advance."""
        return self.request.phase is Phase.RUNNING


def rank_of(entry: Entry) -> Rank:
    """Return the key that entries are sorted by."""
    return entry.rank


class FairShare:
    """Counts the tokens that each tenant has been served; the one with the fewest is next.

    A tenant that was away begins at the count of the least served tenant that is here: rest gives
    no claim to be made up for, and leaving pays no debt.

    Source: the virtual token counter of Sheng et al. 2024 (2401.00588, algorithm 2), with tokens of
    prompt and answer weighted alike; prompts are charged when they begin and without their cached
    part.
    """

    def __init__(self) -> None:
        """Begin with no tenants."""
        self._served: dict[str, float] = {}
        self._num_requests: dict[str, int] = {}

    def served(self, tenant: str) -> float:
        """Return a tenant's count."""
        return self._served.get(tenant, 0.0)

    def enter(self, tenant: str) -> None:
        """Say that a request of a tenant is here."""
        count = self._num_requests.get(tenant, 0)
        if count == 0:
            self._served[tenant] = max(self.served(tenant), self._least())
        self._num_requests[tenant] = count + 1

    def leave(self, tenant: str) -> None:
        """Say that a request of a tenant is gone."""
        self._num_requests[tenant] -= 1
        if self._num_requests[tenant] == 0:
            del self._num_requests[tenant]
            self._forget_settled()

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Count tokens that a tenant was served."""
        self._served[tenant] = self.served(tenant) + num_tokens

    def _least(self) -> float:
        return min((self._served[tenant] for tenant in self._num_requests), default=0.0)

    def _forget_settled(self) -> None:
        """Drop the counts that would be lifted anyway when their tenants come back."""
        if len(self._served) > 2 * len(self._num_requests) + 64 or not self._num_requests:
            least = self._least() if self._num_requests else float("inf")
            self._served = {
                tenant: count
                for tenant, count in self._served.items()
                if tenant in self._num_requests or count > least
            }


class WaitingQueue:
    """Requests that hold no pages, by priority and tenant, each tenant's best ranked first."""

    def __init__(self, share: FairShare) -> None:
        """Order tenants by what they have been served."""
        self._share = share
        self._levels: dict[int, dict[str, list[Entry]]] = {}
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __iter__(self) -> Iterator[Entry]:
        for tenants in self._levels.values():
            for entries in tenants.values():
                yield from entries

    def num_ahead(self, priority: int) -> int:
        """Return how many requests of this or a better priority wait."""
        return sum(count for level, count in self._counts.items() if level <= priority)

    def is_full_for(self, request: Request, limit: int) -> bool:
        """Return whether a request finds `limit` others of its own or a better priority here, and
        its tenant holds its equal share of these places or more, so that nobody can shut others
        out."""
        if self.num_ahead(request.priority) < limit:
            return False
        levels = [tenants for level, tenants in self._levels.items() if level <= request.priority]
        num_tenants = len({request.tenant}.union(*levels))
        num_own = sum(len(tenants.get(request.tenant, ())) for tenants in levels)
        return num_own >= limit // num_tenants

    def push(self, entry: Entry) -> None:
        """Take in a request."""
        level = entry.request.priority
        entries = self._levels.setdefault(level, {}).setdefault(entry.tenant, [])
        bisect.insort(entries, entry, key=rank_of)
        self._counts[level] = self._counts.get(level, 0) + 1

    def remove(self, entry: Entry) -> None:
        """Take out a request that is here."""
        level = entry.request.priority
        tenants = self._levels[level]
        entries = tenants[entry.tenant]
        del entries[bisect.bisect_left(entries, entry.rank, key=rank_of)]
        self._counts[level] -= 1
        if not entries:
            del tenants[entry.tenant]
        if not tenants:
            del self._levels[level], self._counts[level]

    def first(self) -> Entry | None:
        """Return the request whose turn is next."""
        if not self._levels:
            return None
        heads = (entries[0] for entries in self._levels[min(self._levels)].values())
        return min(heads, key=lambda head: turn(head, self._share))


def turn(entry: Entry, share: FairShare) -> tuple[int, float, Rank]:
    """Return the key by which requests take turns at the tokens of a step."""
    return (entry.request.priority, share.served(entry.tenant), entry.rank)

"""The usage ledger: tokens and requests per key, model and day.

Requests add to sums in memory; a thread writes those to the database every `flush_s` seconds. A
process that is killed loses at most what was added since the last write began: no more than
`flush_s` seconds and the time that one write takes. Nothing is counted twice.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import threading
import time
from collections.abc import Callable, Mapping

from sqlalchemy import select

from deepseek.errors import DeepseekError
from deepseek.serve.state.database import Database
from deepseek.serve.state.tables import KeyRow, UsageRow

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What was used."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens: those that did not have to be computed."""
    completion_tokens: int = 0
    requests: int = 0
    errors: int = 0
    """Of the requests: those that were answered by an error."""

    def __add__(self, other: Usage) -> Usage:
        """Return the sum."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Usage(**{name: mine[name] + theirs[name] for name in mine})


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsageLine:
    """What one key used of one model on one day."""

    key_id: str
    model: str
    day: datetime.date
    """In UTC."""
    usage: Usage


class UsageLedger:
    """Adds usage up and keeps it. `close` writes what is left."""

    def __init__(
        self,
        database: Database,
        *,
        flush_s: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start the thread that writes.

        Args:
            database: where to.
            flush_s: seconds between two writes, which is what a kill may lose.
            clock: gives the seconds since 1970, which decide the day.
        """
        self._database = database
        self._clock = clock
        self._sums: dict[tuple[str, str, str], Usage] = {}
        self._changing = threading.Lock()
        self._closing = threading.Event()
        self._flush_s = flush_s
        self._thread = threading.Thread(target=self._run, name="usage-ledger", daemon=True)
        self._thread.start()

    def add(self, key_id: str, model: str, usage: Usage) -> None:
        """Count one request. Touches memory only.

        Args:
            key_id: of the key that pays.
            model: a name from the server's registry, not what the client wrote.
            usage: with `requests=1`, and `errors=1` where it failed.
        """
        day = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).date().isoformat()
        self._merge({(key_id, model, day): usage})

    def flush(self) -> None:
        """Write what was added since the last time; what cannot be written is kept for later.

        Raises:
            DeepseekError: the database cannot be written.
        """
        with self._changing:
            taken, self._sums = self._sums, {}
        if not taken:
            return
        try:
            self._write(taken)
        except BaseException:
            self._merge(taken)
            raise

    def close(self) -> None:
        """Stop the thread and write what is left."""
        self._closing.set()
        self._thread.join()
        self.flush()

    def report(
        self,
        *,
        since: datetime.date | None = None,
        until: datetime.date | None = None,
        key_id: str | None = None,
        tenant: str | None = None,
    ) -> list[UsageLine]:
        """Return usage by day, key and model, of the days from `since` to `until` inclusive.

        Args:
            since: first day, in UTC.
            until: last day.
            key_id: only of this key.
            tenant: only of this tenant's keys.
        """
        query = select(UsageRow).order_by(UsageRow.day, UsageRow.key_id, UsageRow.model)
        if since is not None:
            query = query.where(UsageRow.day >= since.isoformat())
        if until is not None:
            query = query.where(UsageRow.day <= until.isoformat())
        if key_id is not None:
            query = query.where(UsageRow.key_id == key_id)
        if tenant is not None:
            keys = select(KeyRow.id).where(KeyRow.tenant == tenant)
            query = query.where(UsageRow.key_id.in_(keys))
        with self._database.read() as session:
            return [_line(row) for row in session.scalars(query)]

    def _run(self) -> None:
        while not self._closing.wait(self._flush_s):
            try:
                self.flush()
            except DeepseekError as error:
                _LOG.error("usage is kept in memory until it can be written: %s", error)

    def _merge(self, sums: Mapping[tuple[str, str, str], Usage]) -> None:
        with self._changing:
            for place, usage in sums.items():
                self._sums[place] = self._sums.get(place, Usage()) + usage

    def _write(self, sums: Mapping[tuple[str, str, str], Usage]) -> None:
        rows = [
            {"key_id": key_id, "model": model, "day": day, **dataclasses.asdict(usage)}
            for (key_id, model, day), usage in sorted(sums.items())
        ]
        insert = self._database.insert(UsageRow)
        names = [field.name for field in dataclasses.fields(Usage)]
        grown = {name: getattr(UsageRow, name) + insert.excluded[name] for name in names}
        upsert = insert.on_conflict_do_update(index_elements=["key_id", "model", "day"], set_=grown)
        with self._database.write() as session:
            session.execute(upsert, rows)


def _line(row: UsageRow) -> UsageLine:
    usage = Usage(
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        completion_tokens=row.completion_tokens,
        requests=row.requests,
        errors=row.errors,
    )
    day = datetime.date.fromisoformat(row.day)
    return UsageLine(key_id=row.key_id, model=row.model, day=day, usage=usage)

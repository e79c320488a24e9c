"""Files as OpenAI's /v1/files has them: named by the server, kept on disk, bounded, short-lived.

A content is written under a hidden name, brought to the disk, given its name, and only then entered
in the database: what the database knows is whole. A row is removed before its content. What a kill
leaves between the two has no row, and is removed at a later start.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from deepseek.errors import describe
from deepseek.serve.state.contents import ContentFolder, Staged
from deepseek.serve.state.database import Database
from deepseek.serve.state.errors import NotFoundError, QuotaError, RequestError
from deepseek.serve.state.tables import BatchRow, FileRow

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
"""What an upload may be for."""
DAY_S = 86_400
SHORTEST_TTL_S, LONGEST_TTL_S = 3600, 30 * DAY_S
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
"""Statuses of a batch that still needs its input."""

_ID = re.compile(r"file-[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileLimits:
    """How much is kept, and for how long."""

    file_bytes: int = 200 * 2**20
    tenant_bytes: int = 2**30
    total_bytes: int = 8 * 2**30
    """Of all tenants, with the results of batches under way."""
    tenant_files: int = 10_000
    ttl_s: int = LONGEST_TTL_S


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file without its content."""

    id: str
    filename: str
    """What the uploader called it; nothing on disk is called so."""
    purpose: str
    size_bytes: int
    created_at: int
    expires_at: int

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class FileStore:
    """The files of all tenants."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        limits: FileLimits | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep contents in a folder and what is known of them in a database.

        Args:
            database: knows who owns what.
            folder: made where it is missing; nothing else may lie in it.
            limits: by default those of `FileLimits`.
            clock: gives the seconds since 1970.
        """
        self.database = database
        self.limits = limits or FileLimits()
        self.clock = clock
        self.contents = ContentFolder(folder)
        self.contents.remove_orphans(self._all_ids)

    def create(
        self,
        tenant: str,
        filename: str,
        purpose: str,
        content: Iterable[bytes],
        *,
        ttl_s: int | None = None,
    ) -> StoredFile:
        """Keep a file. Blocks while its content is read and brought to the disk.

        Args:
            tenant: who owns it.
            filename: kept to be shown; control characters go.
            purpose: one of `PURPOSES`.
            content: its parts; not read further than the quota allows.
            ttl_s: when it goes, from 1 hour to 30 days from now; by default as the limits say.

        Raises:
            RequestError: the purpose or the time is not one that can be used.
            QuotaError: it is too large, or the tenant or the server has no room for it.
        """
        if purpose not in PURPOSES:
            raise RequestError("purpose", "a file", f"one of {', '.join(PURPOSES)}", purpose)
        check_ttl(ttl_s)
        self.sweep()
        bounded = self._bounded(tenant, content)
        with self.contents.stage(bounded) as staged, self.database.write() as session:
            self._refuse_overfull(session, tenant, staged.size_bytes)
            return _stored(self.record(session, staged, tenant, filename, purpose, ttl_s))

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return what is known of a file.

        Raises:
            NotFoundError: the tenant has no such file.
        """
        with self.database.read() as session:
            return _stored(self._row(session, tenant, file_id))

    def open_path(self, tenant: str, file_id: str) -> Path:
        """Return where the content of a file lies.

        Raises:
            NotFoundError: the tenant has no such file.
        """
        return self.contents.path(self.get(tenant, file_id).id)

    def list(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[StoredFile], bool]:
        """Return a page of a tenant's files and whether more follow it.

        Args:
            tenant: whose.
            purpose: only those for this purpose.
            after: id of the last file of the page before.
            limit: most files of the page.
            order: oldest or newest first.

        Raises:
            NotFoundError: `after` is not a file of the tenant.
        """
        key = FileRow.number.asc() if order == "asc" else FileRow.number.desc()
        query = select(FileRow).where(*self._seen_by(tenant)).order_by(key).limit(limit + 1)
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        with self.database.read() as session:
            if after is not None:
                last = self._row(session, tenant, after).number
                query = query.where(
                    FileRow.number > last if order == "asc" else FileRow.number < last
                )
            rows = session.scalars(query).all()
        return [_stored(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, tenant: str, file_id: str) -> None:
        """Remove a file. A batch that has not read all of it will fail.

        Raises:
            NotFoundError: the tenant has no such file.
        """
        with self.database.write() as session:
            row = self._row(session, tenant, file_id)
            session.delete(row)
        self.contents.remove([file_id])

    def sweep(self) -> int:
        """Remove files whose time has passed, save the inputs of unfinished batches; return how
        many."""
        needed = select(BatchRow.input_file_id).where(BatchRow.status.in_(UNFINISHED))
        gone = (FileRow.expires_at <= int(self.clock()), FileRow.id.not_in(needed))
        with self.database.read() as session:
            if session.scalar(select(FileRow.id).where(*gone).limit(1)) is None:
                return 0
        with self.database.write() as session:
            ids = list(session.scalars(select(FileRow.id).where(*gone)))
            session.execute(delete(FileRow).where(FileRow.id.in_(ids)))
        self.contents.remove(ids)
        return len(ids)

    def record(
        self,
        session: Session,
        staged: Staged,
        tenant: str,
        filename: str,
        purpose: str,
        ttl_s: int | None = None,
    ) -> FileRow:
        """Enter a staged content in a transaction that writes; quotas are the caller's."""
        now = int(self.clock())
        row = FileRow(
            id=staged.id,
            tenant=tenant,
            filename=_shown_name(filename),
            purpose=purpose,
            size_bytes=staged.size_bytes,
            created_at=now,
            expires_at=now + (ttl_s or self.limits.ttl_s),
        )
        session.add(row)
        session.flush()
        return row

    def total_bytes(self, session: Session) -> int:
        """Return what all tenants hold, with the results of batches under way."""
        files = session.scalar(select(func.coalesce(func.sum(FileRow.size_bytes), 0)))
        results = session.scalar(select(func.coalesce(func.sum(BatchRow.result_bytes), 0)))
        return int(files or 0) + int(results or 0)

    def _seen_by(self, tenant: str) -> tuple[Any, ...]:
        return FileRow.tenant == tenant, FileRow.expires_at > int(self.clock())

    def _row(self, session: Session, tenant: str, file_id: str) -> FileRow:
        row = None
        if _ID.fullmatch(file_id):
            query = select(FileRow).where(FileRow.id == file_id, FileRow.tenant == tenant)
            row = session.scalar(query)
        # The input of an unfinished batch outlives its time for the batch; nobody else sees it.
        if row is None or row.expires_at <= int(self.clock()):
            raise NotFoundError("file", file_id)
        return row

    def _held(self, session: Session, tenant: str) -> tuple[int, int]:
        """Return the number of a tenant's files and their bytes."""
        columns = func.count(), func.coalesce(func.sum(FileRow.size_bytes), 0)
        count, held = session.execute(select(*columns).where(FileRow.tenant == tenant)).one()
        return int(count), int(held)

    def _room(self, tenant: str) -> int:
        """Return how many bytes more a tenant may have."""
        with self.database.read() as session:
            self._refuse_overfull(session, tenant, 0)
            held, total = self._held(session, tenant)[1], self.total_bytes(session)
        return min(self.limits.tenant_bytes - held, self.limits.total_bytes - total)

    def _refuse_overfull(self, session: Session, tenant: str, size_bytes: int) -> None:
        count, held = self._held(session, tenant)
        limits, step = self.limits, "Delete files that are not needed"
        if count >= limits.tenant_files:
            must = f"at most {limits.tenant_files}"
            raise QuotaError(describe("number", "your files", must, count + 1, step))
        if held + size_bytes > limits.tenant_bytes:
            must = f"at most {limits.tenant_bytes} bytes"
            raise QuotaError(describe("size", "your files", must, held + size_bytes, step))
        if self.total_bytes(session) + size_bytes > limits.total_bytes:
            must, step = "large enough", "Come back later"
            raise QuotaError(describe("room", "the server's files", must, "none left", step))

    def _bounded(self, tenant: str, content: Iterable[bytes]) -> Iterator[bytes]:
        """Hand on what there is room for."""
        size, room = 0, self._room(tenant)
        for part in content:
            size += len(part)
            if size > self.limits.file_bytes:
                must = f"at most {self.limits.file_bytes} bytes"
                raise QuotaError(describe("size", "the file", must, f"{size} bytes or more"))
            if size > room:
                with self.database.read() as session:
                    self._refuse_overfull(session, tenant, size)
                room = self._room(tenant)
            yield part

    def _all_ids(self) -> set[str]:
        with self.database.read() as session:
            return set(session.scalars(select(FileRow.id)))


def check_ttl(ttl_s: int | None) -> None:
    """Refuse a time to live that OpenAI does not allow.

    Raises:
        RequestError: it is not from 1 hour to 30 days.
    """
    if ttl_s is not None and not SHORTEST_TTL_S <= ttl_s <= LONGEST_TTL_S:
        must = f"from {SHORTEST_TTL_S} to {LONGEST_TTL_S}"
        raise RequestError("expires_after.seconds", "a file", must, ttl_s)


def _shown_name(filename: str) -> str:
    kept = "".join(letter for letter in filename if letter.isprintable()).strip()
    return kept[-255:] or "file"


def _stored(row: FileRow) -> StoredFile:
    return StoredFile(
        id=row.id,
        filename=row.filename,
        purpose=row.purpose,
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )

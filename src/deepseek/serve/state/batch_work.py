"""What moves batches along: validate, hand out lines, keep results, write the files.

The result of a line, its mark and the batch's counts change in one transaction, and only a line
that is still pending takes one. So a line is done once, whatever is killed when: it is in the
database with its result, or pending and run again. The two files are written from those rows, and
their entering, the batch's last status and the removal of the rows are one transaction as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.orm import Session

from deepseek.errors import FormatError
from deepseek.serve.state.batch_lines import (
    MOST_LINE_BYTES,
    LineProblem,
    RawLine,
    ReadLine,
    parse_line,
    read_lines,
)
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.contents import Staged
from deepseek.serve.state.errors import NotFoundError
from deepseek.serve.state.files import UNFINISHED
from deepseek.serve.state.tables import BatchRow, LineRow

_EXPIRED = "This request could not be executed before the completion window expired."
_CANCELLED = "This request was not executed because the batch was cancelled."


@dataclasses.dataclass(frozen=True)
class ActiveBatch:
    """A batch that is not finished."""

    id: str
    tenant: str
    status: str
    expires_at: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A line to be run."""

    batch_id: str
    tenant: str
    line: int
    custom_id: str
    url: str
    body: dict[str, Any]


class BatchWork:
    """The worker's side of a `BatchStore`. All methods block; one worker uses it at a time."""

    def __init__(self, store: BatchStore) -> None:
        """Work on the batches of a store."""
        self._files = store.files
        self._database = store.database
        self._clock = store.clock
        self._limits = store.limits

    def active(self) -> list[ActiveBatch]:
        """Return the batches that are not finished, oldest first."""
        columns = BatchRow.id, BatchRow.tenant, BatchRow.status, BatchRow.expires_at
        query = select(*columns).where(BatchRow.status.in_(UNFINISHED)).order_by(BatchRow.number)
        with self._database.read() as session:
            return [ActiveBatch(*row) for row in session.execute(query)]

    def has_expired(self, batch: ActiveBatch) -> bool:
        """Tell whether the time of a batch is over."""
        return batch.expires_at <= self._clock()

    def validate(self, batch_id: str) -> None:
        """Read the input of a batch that is being validated; it is in progress or failed then."""
        with self._database.read() as session:
            batch = _batch(session, batch_id)
        lines, problems = self._read_all(batch)
        now = int(self._clock())
        with self._database.write() as session:
            row = _batch(session, batch_id)
            if row.status != "validating":
                return
            if problems:
                row.problems = [problem.to_dict() for problem in problems]
                row.status, row.failed_at = "failed", now
                return
            rows = [
                {
                    "batch_id": batch_id,
                    "state": "pending",
                    "result": None,
                    **dataclasses.asdict(line),
                }
                for line in lines
            ]
            session.execute(insert(LineRow), rows)
            row.total = len(lines)
            row.status, row.in_progress_at = "in_progress", now

    def next_task(self, batch_id: str, busy: Iterable[int] = ()) -> Task | None:
        """Return the first pending line of a batch that is in progress, or None.

        Args:
            batch_id: which.
            busy: lines that are being run.

        Raises:
            NotFoundError: the input file was deleted.
            FormatError: the input file is not the one that was validated.
        """
        query = _lines(batch_id, "pending").where(LineRow.line.not_in(list(busy))).limit(1)
        with self._database.read() as session:
            batch = _batch(session, batch_id)
            row = session.scalar(query) if batch.status == "in_progress" else None
        if row is None:
            return None
        with self._opened_input(batch) as file:
            file.seek(row.offset)
            content = file.read(row.size_bytes)
        request = parse_line(RawLine(row.line, row.offset, content), batch.endpoint)
        if isinstance(request, LineProblem) or request.custom_id != row.custom_id:
            raise FormatError(f"Line {row.line} of {batch.input_file_id} has changed on disk.")
        return Task(batch_id, batch.tenant, row.line, row.custom_id, request.url, request.body)

    def record(self, task: Task, status_code: int, body: Any) -> bool:
        """Keep the answer to a line and return True; False where it has one already, or its batch
        has ended.

        Args:
            task: from `next_task`.
            status_code: of HTTP; 200 to 299 goes to the output file, the rest to the error file.
            body: JSON-ready.

        Raises:
            CapacityError: the disk is full; the line stays pending.
        """
        response = {
            "status_code": status_code,
            "request_id": f"req_{secrets.token_hex(12)}",
            "body": body,
        }
        return self._keep(task, response, None, 200 <= status_code < 300)

    def record_error(self, task: Task, code: str, message: str) -> bool:
        """Keep that a line could not be answered at all; returns as `record`."""
        return self._keep(task, None, {"code": code, "message": message}, False)

    def fail(self, batch_id: str, code: str, message: str) -> None:
        """End a batch that cannot go on; what it has done goes to its files."""
        problem = LineProblem(code, message)
        with self._database.write() as session:
            row = _batch(session, batch_id)
            if row.status in UNFINISHED:
                row.problems = [problem.to_dict()]
        self.finish(batch_id, "failed", (code, message))

    def settle(self, batch_id: str) -> bool:
        """Finish a batch that has nothing left to run, or that was cancelled or has expired, and
        return whether there was anything to finish."""
        with self._database.read() as session:
            row = _batch(session, batch_id)
        if row.status == "cancelling":
            self.finish(batch_id, "cancelled", ("batch_cancelled", _CANCELLED))
        elif row.status == "finalizing":
            self.finish(batch_id, "completed", ("server_error", "This request was lost."))
        elif row.expires_at <= self._clock():
            self.finish(batch_id, "expired", ("batch_expired", _EXPIRED))
        else:
            return False
        return True

    def finish(self, batch_id: str, status: str, left: tuple[str, str]) -> None:
        """Write the files of a batch and give it its last status.

        Args:
            batch_id: which.
            status: `completed`, `cancelled`, `expired` or `failed`.
            left: code and message for lines without a result.
        """
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(
                self._files.contents.stage(self._written(batch_id, "done", left))
            )
            errors = self._written(batch_id, "failed", left)
            refused = stack.enter_context(self._files.contents.stage(errors))
            with self._database.write() as session:
                row = _batch(session, batch_id)
                if row.status not in UNFINISHED:
                    output.path.unlink()
                    refused.path.unlink()
                    return
                row.output_file_id = self._entered(session, row, output, "output")
                row.error_file_id = self._entered(session, row, refused, "error")
                row.failed = row.total - row.completed
                row.result_bytes, row.status = 0, status
                setattr(row, f"{status}_at", int(self._clock()))
                session.execute(delete(LineRow).where(LineRow.batch_id == batch_id))

    def sweep(self) -> None:
        """Forget batches that were finished long ago, and files whose time has passed."""
        oldest = int(self._clock()) - self._limits.kept_s
        old = (BatchRow.created_at <= oldest, BatchRow.status.not_in(UNFINISHED))
        with self._database.write() as session:
            session.execute(delete(BatchRow).where(*old))
        self._files.sweep()

    def _read_all(self, batch: BatchRow) -> tuple[list[ReadLine], list[LineProblem]]:
        try:
            with self._opened_input(batch) as file:
                return read_lines(file, batch.endpoint, self._limits.lines)
        except NotFoundError:
            return [], [LineProblem("invalid_file", "The input file was deleted.")]

    @contextlib.contextmanager
    def _opened_input(self, batch: BatchRow) -> Iterator[Any]:
        try:
            file = self._files.contents.path(batch.input_file_id).open("rb")
        except FileNotFoundError:
            raise NotFoundError("file", batch.input_file_id) from None
        with file:
            yield file

    def _keep(self, task: Task, response: Any, error: Any, is_done: bool) -> bool:
        line = _result(task.custom_id, response, error)
        if len(line) > MOST_LINE_BYTES * 4:
            message = "The answer is too large to be kept."
            return self.record_error(task, "answer_too_large", message)
        with self._database.write() as session:
            batch = _batch(session, task.batch_id)
            if batch.status != "in_progress":
                return False
            room = self._files.limits.total_bytes - self._files.total_bytes(session)
            if response is not None and len(line) > room:
                full = {"code": "storage_full", "message": "The server has no room for the answer."}
                line, is_done = _result(task.custom_id, None, full), False
            pending = update(LineRow).where(
                LineRow.batch_id == task.batch_id,
                LineRow.line == task.line,
                LineRow.state == "pending",
            )
            state = "done" if is_done else "failed"
            kept = pending.values(state=state, result=line).returning(LineRow.line)
            if session.scalar(kept) is None:
                return False
            batch.completed += is_done
            batch.failed += not is_done
            batch.result_bytes += len(line)
            if batch.completed + batch.failed == batch.total:
                batch.status, batch.finalizing_at = "finalizing", int(self._clock())
        return True

    def _written(self, batch_id: str, state: str, left: tuple[str, str]) -> Iterator[bytes]:
        """Yield the lines of one of the two files; lines without a result are errors."""
        states = ("failed", "pending") if state == "failed" else (state,)
        error = {"code": left[0], "message": left[1]}
        with self._database.read() as session:
            for row in session.scalars(_lines(batch_id, *states).execution_options(yield_per=100)):
                yield (row.result or _result(row.custom_id, None, error)).encode() + b"\n"

    def _entered(self, session: Session, row: BatchRow, staged: Staged, kind: str) -> str | None:
        """Enter a file of a batch and return its id; an empty one is removed."""
        if not staged.size_bytes:
            staged.path.unlink()
            return None
        name = f"{row.id}_{kind}.jsonl"
        self._files.record(session, staged, row.tenant, name, "batch_output", row.output_ttl_s)
        return staged.id


def _result(custom_id: str, response: Any, error: Any) -> str:
    line = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line)


def _lines(batch_id: str, *states: str) -> Select[LineRow]:
    chosen = LineRow.batch_id == batch_id, LineRow.state.in_(states)
    return select(LineRow).where(*chosen).order_by(LineRow.line)


def _batch(session: Session, batch_id: str) -> BatchRow:
    row = session.scalar(select(BatchRow).where(BatchRow.id == batch_id))
    if row is None:
        raise NotFoundError("batch", batch_id)
    return row

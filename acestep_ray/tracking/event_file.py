"""TensorBoard's events, on a disk that may fail."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from acestep_ray.tracking.retry import Retry

# May wait in memory, where the disk fails.
MEMORY_EVENT_BYTES = 64 * 2**20

Say = Callable[[str], None]


class EventFile:
    """TensorBoard's events of one run; while they cannot be written, the latest wait in memory.

    Not torch's `SummaryWriter`: its thread ends with the first error, and what it held is lost.
    """

    def __init__(self, log_dir: Path, first_step: int, say: Say, *, largest_file: int | None = None):
        """More than `largest_file` bytes go on in another file."""
        self._log_dir = log_dir
        self._first_step = first_step
        self._say = say
        self._largest_file = largest_file
        self._file: BinaryIO | None = None
        self._has_begun = False
        self._records: deque[bytes] = deque()
        self._dropped = 0
        self._retry = Retry()
        self._write_records()

    def write(self, summaries: Iterable[tuple[int, Any]]) -> None:
        """Write summaries by step; what was written survives a kill."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.extend(
            _record(Event(wall_time=time.time(), step=step, summary=summary)) for step, summary in summaries
        )
        if self._retry.is_due:
            self._write_records()
        size = sum(map(len, self._records))
        while size > MEMORY_EVENT_BYTES:
            size -= len(self._records.popleft())
            self._dropped += 1

    def close(self) -> None:
        """Write what waits; what the disk does not take is told as lost."""
        self._write_records()
        if self._records:
            lost = len(self._records) + self._dropped
            self._say(f"warning: {lost} events for TensorBoard are lost: {self._log_dir} takes none")
        self._close_file()

    def _write_records(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
                self._file.write(self._header())
            self._file.write(b"".join(self._records))
            self._file.flush()
            if self._largest_file is not None and self._file.tell() > self._largest_file:
                self._close_file()
        except OSError as error:
            self._close_file()  # its last event may be cut: what follows goes to another file
            self._retry.failed()
            if self._retry.failures == 1:
                self._say(
                    f"warning: {self._log_dir} takes no events for TensorBoard ({error}); "
                    "training goes on, and they wait in memory"
                )
            return
        self._has_begun = True
        self._records.clear()
        if self._retry.failures:
            lost = f", but {self._dropped} for which there was no memory" if self._dropped else ""
            self._say(f"{self._log_dir} takes events for TensorBoard again: those that waited{lost}")
            self._dropped = 0
        self._retry.succeeded()

    def _open(self) -> BinaryIO:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # TensorBoard reads files in the order of their names: a quick restart has to come after what it continues.
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        return open(self._log_dir / f"{name}.from-step-{self._first_step}", "xb")

    def _header(self) -> bytes:
        """What TensorBoard expects first; the run's first file also discards later steps of those before it."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        events = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if self._first_step and not self._has_begun:
            start = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=time.time(), step=self._first_step, session_log=start))
        return b"".join(map(_record, events))

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _record(event: Any) -> bytes:
    """An event as it is in a file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()

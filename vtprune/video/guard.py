"""Decoding in processes of their own: a file that hangs, crashes or fills the memory costs an error and no more."""

from __future__ import annotations

import os
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from vtprune.errors import InvalidOption
from vtprune.video.frames import Frames, check_timeout
from vtprune.video.process import DecoderProcess
from vtprune.video.sampling import Sampling


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    request: dict[str, Any]
    result: Future[Frames]


class Decoders:
    """Processes that decode video files, one file each at a time.

    Use it as a context manager: leaving it ends all processes, and cancels what was not begun.

    Args:
        workers: how many processes.
        timeout: seconds for a file, from when a process begins with it.

    Raises:
        InvalidOption: for options out of range.
    """

    def __init__(self, *, workers: int = 2, timeout: float = 60.0) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InvalidOption(f"workers={workers!r}: expected a whole number from 1 on")
        check_timeout(timeout)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers = [DecoderProcess(float(timeout)) for _ in range(workers)]
        # Daemons: a program that forgets to close must still be able to end.
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True, name="vtprune-decoder")
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        path: str | os.PathLike[str],
        sampling: Sampling,
        *,
        backend: str = "auto",
        on_truncated: str = "warn",
        rate: float | None = None,
    ) -> Future[Frames]:
        """The frames of a file that a sampling chooses, later; arguments and errors are those of `read_frames`.

        Raises:
            InvalidOption: for what is no path or no sampling, and after `close`.
        """
        if not isinstance(path, str | os.PathLike) or not isinstance(sampling, Sampling):
            raise InvalidOption(f"got {type(path).__name__} and {sampling!r}: expected a path and a sampling")
        request = {
            "path": os.path.abspath(path),
            "sampling": sampling.to_dict(),
            "backend": backend,
            "on_truncated": on_truncated,
            "rate": rate,
        }
        job = _Job(request=request, result=Future())
        with self._lock:
            if self._closed:
                raise InvalidOption("these decoders are closed: make new ones")
            self._jobs.put(job)
        return job.result

    def _serve(self, worker: DecoderProcess) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.result.set_running_or_notify_cancel():
                continue
            try:
                job.result.set_result(worker.run(job.request))
            except Exception as error:
                job.result.set_exception(error)
        worker.stop()

    def close(self) -> None:
        """End all processes; files that are being decoded end in errors."""
        with self._lock:
            self._closed = True
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.result.cancel()
        for worker in self._workers:
            self._jobs.put(None)
            worker.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

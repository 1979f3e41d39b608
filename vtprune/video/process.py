"""A process that decodes videos, from its parent's side: a line of JSON each way, then the bytes of the pixels."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import IO, Any

import numpy as np

from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError
from vtprune.video.frames import Frames

logger = logging.getLogger("vtprune")
STARTING = 120.0
"""Seconds for a process to start and to import what it needs, which do not count as decoding."""
LONGEST = threading.TIMEOUT_MAX - 60
"""Seconds that a timer can be set to, and room for patience: months at least, as good as no limit."""
ERRORS: dict[str, type[VtpruneError]] = {"InvalidOption": InvalidOption, "BackendUnavailable": BackendUnavailable}
"""What a process can report, by name."""


class NotStarted(BackendUnavailable):
    """No process can be started here, whatever the file."""


class DecoderProcess:
    """A process that is started when it is first needed, and again after it had to be killed.

    Args:
        timeout: seconds for a file, from when the process begins with it.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None

    def run(self, request: dict[str, Any]) -> Frames:
        """What comes back for a request; raises what `read_frames` raised there.

        Raises:
            InvalidOption: where the process hangs or dies over the file.
            BackendUnavailable: where it does not start.
        """
        try:
            process, begun = self._begun({**request, "timeout": self._timeout})
            with _Deadline(process, self._timeout) as deadline:
                reply = _receive(process) if begun else None
        except BaseException:
            self.stop()
            raise
        if reply is None or deadline.missed:
            code = self.stop()
            if reply is None:
                raise self._failure(request, begun, deadline.missed, code)
        if isinstance(reply, VtpruneError):
            raise reply
        return reply

    def close(self) -> None:
        """End the process, whatever it is doing, and start none again. Any thread may call this."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill(self._process)

    def stop(self) -> int | None:
        """End the process; returns its exit code."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return None
        _kill(process)
        for pipe in (process.stdin, process.stdout):
            _close_quietly(pipe)
        try:
            return process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return None

    def _begun(self, request: dict[str, Any]) -> tuple[subprocess.Popen[bytes], bool]:
        """A process, and whether it took the request; where one died while it had nothing to do, a new one is asked."""
        while True:
            used = self._process is not None
            process = self._started(request["path"])
            with _Deadline(process, STARTING):
                begun = _begin(process, request)
            if begun or not used:
                return process, begun
            self.stop()

    def _started(self, path: str) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise _closed_before(path)
            # One that died is found out by asking it, and is ended then with all that it started.
            if self._process is None:
                if self._complaints is not None:
                    self._complaints.close()
                self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (the process outlives this call)
                self._process = _start(self._complaints)
            return self._process

    def _failure(self, request: dict[str, Any], begun: bool, late: bool, code: int | None) -> VtpruneError:
        path, backend = request["path"], request["backend"]
        if self._closed:
            return _closed_before(path)
        if not begun:
            return NotStarted(f"the process that decodes videos does not start: {self._last_words()}")
        if late:
            return InvalidOption(
                f"{path} was not read within {self._timeout:g} seconds by backend {backend!r}, its process was killed: "
                "allow more time, or leave the file out"
            )
        return InvalidOption(
            f"{path} ended the process that read it by backend {backend!r} ({_ending(code)}): the file is damaged or "
            "the memory too small, leave it out or ask for fewer frames"
        )

    def _last_words(self) -> str:
        assert self._complaints is not None
        self._complaints.seek(0)
        words = self._complaints.read().decode(errors="replace").strip().splitlines()
        return words[-1] if words else "it says nothing"


def _closed_before(path: str) -> InvalidOption:
    return InvalidOption(f"{path} was not read to its end: the decoders were closed before")


class _Deadline:
    """Kills a process that is not done within some seconds."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self.missed = False
        self._process = process
        self._timer = threading.Timer(min(seconds, LONGEST), self._kill)
        self._timer.daemon = True

    def _kill(self) -> None:
        self.missed = True
        _kill(self._process)

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        # It may be ringing just now, and must not kill what comes after.
        self._timer.join()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: it leads a group, whose number is free once the process was waited for."""
    if process.returncode is None and hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError as error:
            logger.debug("the group of a decoder: %s", error)
    process.kill()


def _start(complaints: IO[bytes]) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise NotStarted("there is no Python interpreter to start (sys.executable is empty): read without timeout")
    # The child finds modules where this process does, and not first of all in the working directory.
    places = [place or os.getcwd() for place in sys.path if isinstance(place, str)]
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "vtprune.video.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            start_new_session=True,
        )
    except OSError as error:
        raise NotStarted(f"the process that decodes videos does not start: {error}") from error


def _begin(process: subprocess.Popen[bytes], request: dict[str, Any]) -> bool:
    """Whether the process took the request, and has imported what it needs for it."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        return False
    return _line(process) is not None


def _line(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """The next line of the process, None where it ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _receive(process: subprocess.Popen[bytes]) -> Frames | VtpruneError | None:
    """Frames or an error, None where the process ended."""
    head = _line(process)
    if head is None:
        return None
    if "error" in head:
        return ERRORS[head["error"]](head["text"])
    pixels = np.empty(head["shape"], dtype=np.uint8)
    room = memoryview(pixels.reshape(-1))  # type: ignore[arg-type]
    assert process.stdout is not None
    while room:
        count = process.stdout.readinto(room)  # type: ignore[attr-defined]
        if not count:
            return None
        room = room[count:]
    return Frames(
        pixels=pixels,
        times=np.asarray(head["times"], dtype=np.float64),
        indices=np.asarray(head["indices"], dtype=np.int64),
        total=head["total"],
        duration=head["duration"],
        backend=head["backend"],
        warnings=tuple(head["warnings"]),
        seconds=head["seconds"],
    )


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _close_quietly(pipe: IO[bytes] | None) -> None:
    """Closing writes what is left, which nobody reads any more."""
    if pipe is not None:
        try:
            pipe.close()
        except OSError as error:
            logger.debug("the pipe of a decoder: %s", error)

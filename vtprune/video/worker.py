"""What a child process runs (`python -m vtprune.video.worker`): it reads the videos that its parent names."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import queue
import signal
import threading
from typing import IO, Any

import numpy as np

from vtprune.errors import VtpruneError
from vtprune.video.frames import Frames
from vtprune.video.process import ERRORS, LONGEST
from vtprune.video.reader import prepare, read_frames
from vtprune.video.sampling import from_dict

PATIENCE = 10.0
"""Seconds after its timeout that a process gives up by itself, should its parent no longer be there to kill it."""


def main() -> None:
    """Answer requests until the pipe is closed."""
    requests, replies = _take_pipes()
    # A key pressed in the terminal is for the parent, which ends this process if it wants to.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    with open(os.devnull, "w") as nowhere:
        while True:
            request = json.loads(inbox.get())
            prepare(request["backend"])
            _send(replies, {"begun": True})
            # Runs in a thread of C: it works where a decoder hangs without ever giving Python a turn.
            limit = min(request["timeout"], LONGEST) + PATIENCE
            faulthandler.dump_traceback_later(limit, exit=True, file=nowhere)
            _reply(replies, request)
            # Decoders hang on each other in circles, and hold far more memory than Python knows of.
            gc.collect()
            faulthandler.cancel_dump_traceback_later()


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The ends of the pipes. Libraries that print, or read, find nothing where they expect them."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    return requests, replies


def _listen(requests: IO[bytes], inbox: queue.SimpleQueue[bytes]) -> None:
    """Hand requests on; the end of the pipe is the end of this process and of what it started, whatever it is doing."""
    for line in requests:
        inbox.put(line)
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _reply(replies: IO[bytes], request: dict[str, Any]) -> None:
    answer = _answer(request)
    if not isinstance(answer, Frames):
        _send(replies, answer)
        return
    head = {
        "shape": answer.pixels.shape,
        "times": answer.times.tolist(),
        "indices": answer.indices.tolist(),
        "total": answer.total,
        "duration": answer.duration,
        "backend": answer.backend,
        "warnings": answer.warnings,
        "seconds": answer.seconds,
    }
    _send(replies, head, answer.pixels)


def _answer(request: dict[str, Any]) -> Frames | dict[str, str]:
    path = request["path"]
    try:
        return read_frames(
            path,
            from_dict(request["sampling"]),
            backend=request["backend"],
            on_truncated=request["on_truncated"],
            rate=request["rate"],
        )
    except VtpruneError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS]
        return {"error": (kinds or ["InvalidOption"])[0], "text": str(error)}
    except Exception as error:
        return {"error": "InvalidOption", "text": f"cannot read {path}: {type(error).__name__}: {error}"}


def _send(replies: IO[bytes], head: dict[str, Any], pixels: np.ndarray | None = None) -> None:
    replies.write(json.dumps(head).encode() + b"\n")
    if pixels is not None:
        replies.write(np.ascontiguousarray(pixels).data)
    replies.flush()


if __name__ == "__main__":
    main()

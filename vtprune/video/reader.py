"""Opens a clip, whatever it is stored as, and reads the frames that a sampling chooses."""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.video.frames import Frames, Refused, Video, check_size, check_timeout
from vtprune.video.read_stills import open_array_file, open_folder, open_memory
from vtprune.video.sampling import Sampling

logger = logging.getLogger("vtprune")
_MOVING = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mpg", ".mpeg", ".wmv")
_HEAD = 256
"""Bytes that tell a list of files from a video."""
Source = str | os.PathLike[str] | np.ndarray | Sequence[Image.Image]
OnTruncated = Literal["warn", "raise"]


def _pyav(path: Path) -> Video:
    from vtprune.video.read_pyav import PyavVideo

    return PyavVideo(path)


def _decord(path: Path) -> Video:
    from vtprune.video.read_decord import DecordVideo

    return DecordVideo(path)


def _torchcodec(path: Path) -> Video:
    from vtprune.video.read_torchcodec import TorchcodecVideo

    return TorchcodecVideo(path)


_OPENERS: dict[str, Callable[[Path], Video]] = {"pyav": _pyav, "decord": _decord, "torchcodec": _torchcodec}
_MODULES = {
    "pyav": ("av", "vtprune.video.read_pyav"),
    "decord": ("decord", "vtprune.video.read_decord"),
    "torchcodec": ("av", "torchcodec.decoders", "vtprune.video.read_torchcodec"),
}
BACKENDS = tuple(_OPENERS)
AUTO = ("pyav", "decord")
"""PyAV first: it is exact to the frame in every format tried, reads what is there of damaged files, and brings a
current FFmpeg. decord has FFmpeg 4, decodes from the beginning and refuses more. torchcodec needs the index of PyAV, so
it reads nothing that PyAV does not."""


def open_video(source: Source, *, backend: str = "auto", rate: float | None = None) -> Video:
    """Open a clip; close it after use.

    Args:
        source: a video file; a folder of pictures; a `.npy` file or array (T, H, W, 3) of uint8; a list of pictures.
        backend: one of `BACKENDS` for video files, or "auto" for the first of `AUTO` that can open it.
        rate: frames a second of pictures and arrays, which do not say.

    Raises:
        InvalidOption: for a clip that is missing, empty, damaged, too large or something else.
        BackendUnavailable: for a backend that is not installed, or gets this file wrong.
    """
    check_backend(backend)
    if rate is not None and not 0 < rate < float("inf"):
        raise InvalidOption(f"rate={rate!r}: expected a number above 0, in frames a second")
    if isinstance(source, np.ndarray | list | tuple):
        return open_memory(source, rate)
    if not isinstance(source, str | os.PathLike):
        raise InvalidOption(f"a clip of type {type(source).__name__}: expected a path, an array or a list of pictures")
    # FFmpeg takes "a:b.mp4" for something else than a file.
    path = Path(os.path.abspath(source))
    try:
        return _open_path(path, backend, rate)
    except OSError as error:
        raise InvalidOption(f"cannot read {path}: {error.strerror or error}") from error


def read_frames(
    source: Source,
    sampling: Sampling,
    *,
    backend: str = "auto",
    on_truncated: OnTruncated = "warn",
    timeout: float | None = None,
    rate: float | None = None,
) -> Frames:
    """The frames of a clip that a sampling chooses.

    Args:
        source: as for `open_video`.
        sampling: which frames, of those that are there.
        backend: as for `open_video`.
        on_truncated: "warn" leaves out what cannot be decoded and says so in `Frames.warnings`, and how many frames
            may show damage; "raise" raises for either.
        timeout: seconds after which a file is given up. It is decoded in a process of its own then. What is in memory
            already is not.
        rate: as for `open_video`.

    Raises:
        InvalidOption: as `open_video` does, where no frame can be decoded, and where it takes longer than `timeout`.
        BackendUnavailable: as `open_video` does.
    """
    check_request(sampling, on_truncated)
    if timeout is not None:
        check_timeout(timeout)
    if timeout is not None and isinstance(source, str | os.PathLike):
        from vtprune.video.guard import Decoders

        with Decoders(workers=1, timeout=timeout) as decoders:
            return decoders.submit(source, sampling, backend=backend, on_truncated=on_truncated, rate=rate).result()
    name = os.path.abspath(source) if isinstance(source, str | os.PathLike) else "the clip"
    begin = time.perf_counter()
    with closing(open_video(source, backend=backend, rate=rate)) as video:
        frames = _read(video, name, sampling, on_truncated)
    return replace(frames, seconds=time.perf_counter() - begin)


def check_request(sampling: object, on_truncated: object) -> None:
    """Raise `InvalidOption` for what is no sampling, or no way to deal with truncated files."""
    if not isinstance(sampling, Sampling):
        raise InvalidOption(f"sampling={sampling!r}: expected a value like Uniform(32)")
    if on_truncated not in ("warn", "raise"):
        raise InvalidOption(f"on_truncated={on_truncated!r}: expected 'warn' or 'raise'")


def check_backend(backend: object) -> None:
    """Raise `InvalidOption` for a name that is no backend."""
    if backend not in ("auto", *BACKENDS):
        raise InvalidOption(f"backend={backend!r}: expected 'auto' or one of {', '.join(BACKENDS)}")


def prepare(backend: str) -> str:
    """Import what a backend needs, for "auto" what is tried first; returns what is in the way, empty if nothing is."""
    if backend == "auto":
        return prepare(AUTO[0]) and prepare(AUTO[1])
    try:
        for module in _MODULES.get(backend, ()):
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return (str(error) or type(error).__name__).strip().splitlines()[0]
    return ""


def check_reads_files(backend: str) -> None:
    """Raise `BackendUnavailable` where no video file can be read by a backend, or by any that "auto" tries."""
    check_backend(backend)
    obstacles: dict[str, str] = {}
    for name in AUTO if backend == "auto" else (backend,):
        obstacles[name] = prepare(name)
        if not obstacles[name]:
            return
    reasons = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items())
    raise BackendUnavailable(f"no video file can be read here ({reasons}): pip install 'vtprune[video]'")


def _open_path(path: Path, backend: str, rate: float | None) -> Video:
    if path.is_dir():
        return open_folder(path, rate)
    if not path.exists():
        raise InvalidOption(f"no video at {path}: expected a file or a folder of pictures on this machine")
    if not path.is_file():
        raise InvalidOption(f"{path} is not a file: expected a video, a folder of pictures or an array")
    if path.stat().st_size == 0:
        raise InvalidOption(f"{path} is empty: expected a video")
    if path.suffix.lower() == ".npy":
        return open_array_file(path, rate)
    _check_no_playlist(path)
    if rate is not None:
        raise InvalidOption(f"rate={rate!r}: {path} says itself when frames are shown, leave the rate out")
    return _open_by_any(path) if backend == "auto" else _open_by(backend, path)


def _check_no_playlist(path: Path) -> None:
    """FFmpeg follows lists of other files, wherever these lie."""
    with path.open("rb") as file:
        head = file.read(_HEAD).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0")):
        raise Refused(f"{path} is a list of other files: expected a video")


def _check_no_pattern(path: Path) -> None:
    """For pictures FFmpeg takes such a name for that of many files. PyAV can be told not to."""
    if "%" in str(path) and path.suffix.lower() not in _MOVING:
        raise Refused(f"{path} may be taken for the names of many pictures: leave % out of the name")


def _open_by(backend: str, path: Path) -> Video:
    obstacle = prepare(backend)
    if obstacle:
        extra = " torchcodec" if backend == "torchcodec" else ""
        raise BackendUnavailable(
            f"the video backend {backend!r} cannot be used here ({obstacle}): pip install 'vtprune[video]'{extra}"
        )
    if backend != "pyav":
        _check_no_pattern(path)
    return _OPENERS[backend](path)


def _open_by_any(path: Path) -> Video:
    said: dict[str, str] = {}
    missing = {backend: obstacle for backend in AUTO if (obstacle := prepare(backend))}
    for backend in AUTO:
        if backend in missing:
            continue
        try:
            return _open_by(backend, path)
        except Refused:
            raise
        except (InvalidOption, BackendUnavailable) as error:
            logger.debug("backend %s: %s", backend, error)
            said[backend] = str(error)
    if not said:
        reasons = "; ".join(f"{backend}: {obstacle}" for backend, obstacle in missing.items())
        raise BackendUnavailable(f"no video backend can be used here ({reasons}): pip install 'vtprune[video]'")
    raise InvalidOption("no backend reads this. " + "; ".join(f"{backend}: {words}" for backend, words in said.items()))


def _read(video: Video, name: str, sampling: Sampling, on_truncated: OnTruncated) -> Frames:
    indices = sampling.choose(video)
    check_size(name, video.size, len(indices))
    pixels = np.empty((len(indices), *video.size, 3), dtype=np.uint8)
    found: list[int] = []
    for index, frame in video.frames(indices):
        pixels[len(found)] = frame
        found.append(index)
    if not found:
        raise InvalidOption(f"no frame of {name} that was asked for can be decoded: the file is truncated or damaged")
    troubles = [video.damage] if video.damage else []
    if len(found) < len(indices):
        lost = len(indices) - len(found)
        troubles.append(
            f"{lost} of {len(indices)} frames asked for could not be decoded: the file is truncated or damaged"
        )
    doubtful = video.doubtful(found)
    if doubtful:
        troubles.append(
            f"{len(doubtful)} of {len(indices)} frames asked for may show damage: they lean on parts of the file that "
            "cannot be decoded"
        )
    if troubles and on_truncated == "raise":
        raise InvalidOption(f"{name}: {'; '.join(troubles)}; on_truncated='warn' takes what is there")
    return Frames(
        pixels=pixels[: len(found)],
        times=video.times[found],
        indices=np.asarray(found, dtype=np.int64),
        total=len(video.times),
        duration=video.duration,
        backend=video.backend,
        warnings=(*video.warnings, *troubles),
    )

"""The page as a server: for this machine only, with a cap on uploads, and without a request to any other address."""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from vtprune.demo.photo_host import PhotoHost
from vtprune.demo.session import Host

pytest.importorskip("gradio")
CAP = 3000
"""Bytes of an upload, here."""
LOCAL = "0100007F"
"""127.0.0.1 as the kernel writes it."""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Any]]:
    """The address of a page, and the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "GRADIO_ANALYTICS_ENABLED", "False")
        from vtprune.demo import app

        patch.setattr(app, "MAX_FILE", CAP)
        hosts = [("Ask a model", Host.load("tiny:llava", "cpu")), ("Photos", PhotoHost(source="tiny:llava"))]
        address, blocks = app.serve(hosts)
        yield address.rstrip("/"), blocks
        blocks.close()


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """The address of another server, and what it was asked for."""
    asked: list[str] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *given: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def fetched(request: urllib.request.Request | str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(address: str, data: bytes) -> tuple[int, bytes]:
    edge = uuid.uuid4().hex
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
    body = head.encode() + data + f"\r\n--{edge}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
    return fetched(urllib.request.Request(f"{address}/gradio_api/upload", body, kind))


def listening(port: int) -> list[str]:
    """Addresses of this machine at which a port is listened to, in the hexadecimal of the kernel."""
    found = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                found.append(local.rpartition(":")[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells it in /proc")
def test_the_page_is_served_on_this_machine_only(served: tuple[str, Any]) -> None:
    port = urlsplit(served[0]).port
    assert port is not None and listening(port) == [LOCAL]
    assert fetched(served[0] + "/")[0] == 200


def test_uploads_above_the_cap_are_refused(served: tuple[str, Any]) -> None:
    status, told = upload(served[0], b"x" * (CAP - 1))
    assert status == 200 and len(json.loads(told)) == 1
    status, told = upload(served[0], b"x" * (CAP + 1))
    assert status == 413 and str(CAP).encode() in told


def takers(blocks: Any) -> list[tuple[int, list[Any], int]]:
    """Steps that take what a visitor brings: the number of the step, its inputs, and which of them is the file."""
    import gradio as gr

    found = []
    for number, step in blocks.fns.items():
        for place, part in enumerate(step.inputs):
            brought = isinstance(part, gr.File) and part.visible is not False
            if brought or (isinstance(part, gr.Image) and part.sources == ["webcam"]):
                found.append((number, list(step.inputs), place))
    return found


def done(address: str, number: int, data: list[Any]) -> dict[str, Any]:
    """What becomes of a step, as a script asks for it."""
    visitor = uuid.uuid4().hex
    asked = {"data": data, "fn_index": number, "session_hash": visitor, "trigger_id": None, "event_data": None}
    kind = {"Content-Type": "application/json"}
    status, _ = fetched(urllib.request.Request(f"{address}/gradio_api/queue/join", json.dumps(asked).encode(), kind))
    assert status == 200
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={visitor}", timeout=60) as lines:
        for line in lines:
            told = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if told.get("msg") == "process_completed":
                return dict(told)
    raise AssertionError("the step did not end")


def test_addresses_that_a_request_names_are_not_fetched(
    served: tuple[str, Any], listener: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the file and for the camera, in both tabs, as a path and as the address of one."""
    import gradio as gr
    from gradio import processing_utils

    address, blocks = served
    elsewhere, asked = listener

    async def fetch(url: str, cache_dir: str) -> str:
        """As gradio does for addresses of other machines; those of this one it would not ask by itself."""
        fetched(url)
        raise OSError("nothing there")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    steps = takers(blocks)
    assert len({inputs[place]._id for _, inputs, place in steps}) == 4
    named = [
        {"path": f"{elsewhere}/a.png"},
        {"path": f"{elsewhere}/a.png".upper()},
        {"path": "a.png", "url": f"{elsewhere}/b.png"},
        {"path": "a.png", "url": f"/gradio_api/proxy={elsewhere}/c.png"},
        {"path": f"ftp{elsewhere.removeprefix('http')}/d.png"},
        {"path": "/etc/passwd"},
    ]
    for number, inputs, place in steps:
        for one in named:
            # What a visitor did stays with the server.
            data = [None if isinstance(part, gr.State) else getattr(part, "value", None) for part in inputs]
            data[place] = {**one, "meta": {"_type": "gradio.FileData"}}
            assert done(address, number, data)["success"] is False, one
    for path in (f"/gradio_api/file={elsewhere}/e", f"/gradio_api/proxy={elsewhere}/f", "/gradio_api/file=/etc/passwd"):
        assert fetched(address + path)[0] >= 400
    assert asked == []

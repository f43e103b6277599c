"""Downloads over bad connections, on a real server on this machine that misbehaves as told."""

import contextlib
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llm_shared import download as module
from llm_shared import resources
from llm_shared.download import download
from llm_shared.resources import Download, fetch

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.starts.append(start)
        mood = server.moods.pop(0) if server.moods else "good"
        if mood == "redirect":
            return self.head(302, 0, Location="/elsewhere")
        if mood in (404, 500, 503):
            return self.head(mood, 0)
        content = bytes(len(CONTENT)) if mood == "corrupt" else CONTENT
        if mood == "no ranges":
            start = 0
        if start >= len(content):
            return self.head(416, 0)
        self.head(206 if start else 200, len(content) - start)
        rest = content[start:]
        if mood == "truncate":
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest[: len(rest) // 3])
        if mood == "stall":
            threading.Event().wait(3)
        if mood == "slow":
            threading.Event().wait(0.5)
        if mood == "die":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.wfile.write(rest[len(rest) // 3 :])
        self.close_connection = True

    def head(self, status, length, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": length, "Connection": "close"}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.close_connection = True

    def handle(self):
        with contextlib.suppress(OSError):  # the client may have gone
            super().handle()

    def log_message(self, *args):
        pass


@pytest.fixture
def web(monkeypatch):
    """A local web server with moods, one per request; starts: the byte from which each request asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.moods, server.starts = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(module, "TIMEOUT", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # no pause between tries
    yield server
    server.shutdown()
    server.server_close()


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize(
    ("moods", "requests"),
    [
        ([], 1), (["redirect"], 2), (["die"], 2), (["truncate"], 2), (["stall"], 2), (["die"] * 9, 10), ([500, 503, 500], 4),
        (["die", "no ranges"], 2), (["die", 500, "truncate", "redirect", "stall"], 6),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_connection_still_brings_the_whole_file(web, tmp_path, moods, requests):
    web.moods = list(moods)
    path = tmp_path / "new" / "file"
    download(web.url, SHA256, path)
    assert path.read_bytes() == CONTENT and files(path.parent) == ["file"]
    assert len(web.starts) == requests
    if moods and set(moods) <= {"die", "stall", "truncate"}:
        assert web.starts == sorted(web.starts) and web.starts[-1] > 0  # it went on, it did not start anew


def test_other_content_is_thrown_away(web, tmp_path):
    web.moods = ["corrupt"]
    with pytest.raises(OSError, match="content is not the expected one"):
        download(web.url, SHA256, tmp_path / "file")
    assert files(tmp_path) == []
    download(web.url, SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (500, module.TRIES)])
def test_what_cannot_be_had_is_said(web, tmp_path, status, requests):
    web.moods = [status] * 20
    with pytest.raises(OSError, match=str(status)):
        download(web.url, SHA256, tmp_path / "file")
    assert files(tmp_path) == [] and len(web.starts) == requests


def test_nobody_answers(web, tmp_path):
    web.shutdown()
    web.server_close()
    with pytest.raises(OSError, match="127.0.0.1"):
        download(web.url, SHA256, tmp_path / "file")
    assert files(tmp_path) == []


def test_a_later_run_goes_on_where_the_first_stopped(web, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRIES", 1)
    web.moods = ["die", 500]
    with pytest.raises(OSError, match="500"):
        download(web.url, SHA256, tmp_path / "file")
    assert files(tmp_path) == ["file.part"]
    received = (tmp_path / "file.part").stat().st_size
    download(web.url, SHA256, tmp_path / "file")
    assert web.starts[-1] == received > 0 and (tmp_path / "file").read_bytes() == CONTENT


def test_a_whole_part_needs_no_byte_more(web, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    download(web.url, SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and web.starts == [len(CONTENT)]


def test_two_processes_end_with_one_good_file(web, tmp_path):
    web.moods = ["slow"]
    program = "import sys, pathlib; from llm_shared.download import download; download(*sys.argv[1:3], pathlib.Path(sys.argv[3]))"
    command = [sys.executable, "-c", program, web.url, SHA256, tmp_path / "file"]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "file").read_bytes() == CONTENT and files(tmp_path) == ["file"]
    assert web.starts == [0]  # one downloaded, the other waited


def test_killed_in_the_middle(web, tmp_path):
    web.moods = ["stall"]
    program = "import sys, pathlib; from llm_shared.download import download; download(*sys.argv[1:3], pathlib.Path(sys.argv[3]))"
    process = subprocess.Popen([sys.executable, "-c", program, web.url, SHA256, tmp_path / "file"])
    part = tmp_path / "file.part"
    for _ in range(1000):
        if part.is_file() and part.stat().st_size:
            break
        threading.Event().wait(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "file").exists()
    download(web.url, SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and web.starts[-1] > 0


def test_a_full_disk_is_said(web, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="No space left"):
        download(web.url, SHA256, tmp_path / "file")
    assert files(tmp_path) == []


def test_fetch_says_what_to_do_and_offline_opens_no_socket(web, tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "CACHE", tmp_path)
    monkeypatch.setitem(resources.DOWNLOADS, "some/file", Download(web.url, SHA256))
    monkeypatch.setenv("LLM_OFFLINE", "1")
    with monkeypatch.context() as nothing:
        nothing.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a socket was opened"))
        with pytest.raises(OSError, match=r"LLM_OFFLINE=1 forbids the download: unset it, or copy the file there"):
            fetch("some/file")
    assert web.starts == [] and not os.listdir(tmp_path)
    monkeypatch.delenv("LLM_OFFLINE")
    web.moods = [404]
    with pytest.raises(OSError, match=r"could not download some/file from http.*404.*run again"):
        fetch("some/file")
    assert fetch("some/file").read_bytes() == CONTENT
    assert fetch("some/file") == tmp_path / "some/file" and len(web.starts) == 2

"""Downloads over bad connections, on a real server on this machine that misbehaves as told."""

import contextlib
import gzip
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from llm_shared import download as module
from llm_shared import resources
from llm_shared.download import download
from llm_shared.resources import Download, fetch
import pytest
from samples import ROOT

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PART = f"file.{SHA256[:8]}.part"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.starts.append(start)
        server.paths.append(self.path)
        mood = server.moods.pop(0) if server.moods else server.bad_paths.get(self.path, "good")
        if mood in ("redirect", "loop"):
            return self.head(302, 0, Location="/elsewhere" if mood == "redirect" else self.path)
        if mood == "ftp":
            return self.head(302, 0, Location="ftp://127.0.0.1/file")
        if isinstance(mood, tuple):
            return self.head(mood[0], 0, **{"Retry-After": mood[1]})
        if isinstance(mood, int):
            return self.head(mood, 0)
        if mood in ("portal", "text portal"):
            page, kind = b"<html>log in</html>", "text/html; charset=utf-8" if mood == "portal" else "text/plain"
            self.head(200, len(page), **{"Content-Type": kind})
            return self.wfile.write(page)
        if mood == "gzip":
            return self.gzipped()
        content = bytes(len(CONTENT)) if mood in ("corrupt", "corrupt, die") else CONTENT
        if mood in ("no ranges", "no ranges, die"):
            start = 0
        if start >= len(content):
            return self.head(416, 0, **{"Content-Range": f"bytes */{len(content)}"})
        if mood == "wrong range" and start:
            start += 100
        where = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        rest = content[start:]
        if mood in ("chunked", "chunked, die"):
            return self.chunked(rest, where, mood)
        self.head(206 if start and mood != "200 for a part" else 200, len(content) - start, **where)
        if mood == "one byte":
            self.wfile.write(rest[:1])
            return self.connection.shutdown(socket.SHUT_RDWR)
        if mood == "truncate":
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest[: len(rest) // 3])
        if mood == "stall":
            threading.Event().wait(3)
        if mood == "slow":
            threading.Event().wait(0.5)
        if mood.endswith("die"):
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.wfile.write(rest[len(rest) // 3 :])
        self.close_connection = True

    def gzipped(self):
        packed = gzip.compress(CONTENT, 1, mtime=0)
        self.head(200, len(packed), **{"Content-Encoding": "gzip"})
        self.wfile.write(packed)

    def chunked(self, rest, where, mood):
        self.head(206 if where else 200, None, **where, **{"Transfer-Encoding": "chunked"})
        for i in range(0, len(rest), 1 << 18):
            piece = rest[i : i + (1 << 18)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if mood == "chunked, die":
                return self.connection.shutdown(socket.SHUT_RDWR)
        self.wfile.write(b"0\r\n\r\n")

    def head(self, status, length, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": length, "Connection": "close"}).items():
            if value is not None:
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
    """A local web server with moods, one per request, then one per path; starts: the byte from which each request asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.moods, server.starts, server.paths, server.bad_paths, server.pauses = [], [], [], {}, []
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    monkeypatch.setattr(time, "sleep", server.pauses.append)  # no pause between tries
    yield server
    server.shutdown()
    server.server_close()


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def half(folder):
    """Leave half a file in folder, as an interrupted download does; return its size."""
    (folder / PART).write_bytes(CONTENT[: len(CONTENT) // 2])
    return len(CONTENT) // 2


@pytest.mark.parametrize(
    ("moods", "requests"),
    [
        ([], 1), (["redirect"], 2), (["die"], 2), (["truncate"], 2), (["stall"], 2), (["die"] * 9, 10), ([500, 503, 500], 4),
        (["die", "no ranges"], 2), (["die", 500, "truncate", "redirect"], 5), (["die", "no ranges, die"], 3),
        (["die", "wrong range"], 3), (["die", "200 for a part"], 3), (["portal"] * 4, 5), (["die", "portal"], 3),
        ([408, 425, 429, 502], 5), (["chunked"], 1), (["chunked, die"] * 3, 4), (["gzip"], 1), (["corrupt, die"], 3),
        (["die", "gzip"], 2),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_connection_still_brings_the_whole_file(web, tmp_path, moods, requests):
    web.moods = list(moods)
    path = tmp_path / "new" / "file"
    download([web.url], SHA256, path)
    assert path.read_bytes() == CONTENT and files(path.parent) == ["file"]
    assert len(web.starts) == requests
    if moods and set(moods) <= {"die", "stall", "truncate"}:
        assert web.starts == sorted(web.starts) and web.starts[-1] > 0  # it went on, it did not start anew


def test_other_content_is_thrown_away(web, tmp_path):
    web.moods = ["corrupt"]
    with pytest.raises(OSError, match="content is not the expected one"):
        download([web.url], SHA256, tmp_path / "file")
    assert files(tmp_path) == []
    download([web.url], SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("mood", "message", "requests"),
    [
        (404, "404", 1), (403, "403", 1), (410, "410", 1), (500, "500", module.TRIES), (429, "429", module.TRIES),
        ("loop", "30 redirects", 31), ("ftp", "ftp", 1), ("portal", "a web page came instead", module.TRIES),
        ("text portal", "content is not the expected one", 1),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_had_is_said(web, tmp_path, mood, message, requests):
    web.moods = [mood] * 40
    with pytest.raises(OSError, match=message):
        download([web.url], SHA256, tmp_path / "file")
    assert files(tmp_path) == [] and len(web.starts) == requests


def test_nobody_answers(web, tmp_path):
    web.shutdown()
    web.server_close()
    with pytest.raises(OSError, match="127.0.0.1"):
        download([web.url], SHA256, tmp_path / "file")
    assert files(tmp_path) == []


def test_a_later_run_goes_on_where_the_first_stopped(web, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRIES", 1)
    web.moods = ["die", 500]
    with pytest.raises(OSError, match="500"):
        download([web.url], SHA256, tmp_path / "file")
    assert files(tmp_path) == [PART]
    received = (tmp_path / PART).stat().st_size
    download([web.url], SHA256, tmp_path / "file")
    assert web.starts[-1] == received > 0 and (tmp_path / "file").read_bytes() == CONTENT


def test_a_whole_part_needs_no_byte_more(web, tmp_path):
    (tmp_path / PART).write_bytes(CONTENT)
    download([web.url], SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and web.starts == [len(CONTENT)]


@pytest.mark.parametrize("mood", ["portal", 404, 503, "one byte", "loop"])
def test_half_a_file_outlives_what_comes_instead(web, tmp_path, mood):
    start = half(tmp_path)
    web.moods = [mood] * 40
    with pytest.raises(OSError):
        download([web.url], SHA256, tmp_path / "file")
    assert files(tmp_path) == [PART] and (tmp_path / PART).read_bytes()[:start] == CONTENT[:start]
    web.moods = []
    download([web.url], SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and files(tmp_path) == ["file"]
    assert start <= web.starts[-1] < start + 100


@pytest.mark.parametrize(
    "part", [CONTENT + b"more", bytes(1000), bytes(len(CONTENT)), b""], ids=["long", "wrong", "same size", "empty"]
)
def test_a_bad_part_does_not_stay(web, tmp_path, part):
    (tmp_path / PART).write_bytes(part)
    download([web.url], SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and files(tmp_path) == ["file"]


def test_a_part_of_another_version_is_left_alone(web, tmp_path):
    (tmp_path / "file.01234567.part").write_bytes(bytes(1000))
    download([web.url], SHA256, tmp_path / "file")
    assert web.starts == [0] and files(tmp_path) == ["file", "file.01234567.part"]


def test_a_server_that_always_dies_is_given_up(web, tmp_path):
    web.moods = ["one byte"] * 200
    with pytest.raises(OSError, match="incomplete|IncompleteRead|broken|aborted|reset"):
        download([web.url], SHA256, tmp_path / "file")
    assert len(web.starts) == module.TRIES


@pytest.mark.parametrize(
    ("asked", "pause"),
    [
        ("7", 7),
        ("0", 0),
        ("999999", module.LONGEST_PAUSE),
        ("-5", 1),
        ("soon", 1),
        ("", 1),
        ("9" * 30, module.LONGEST_PAUSE),
    ],
)
def test_a_server_may_ask_to_wait(web, tmp_path, asked, pause):
    web.moods = [(429, asked)]
    download([web.url], SHA256, tmp_path / "file")
    assert web.pauses == [pause]


@pytest.mark.parametrize(
    "mood", ["corrupt", 404, 500, "portal", "text portal", "loop", "ftp", "one byte", "wrong range"]
)
@pytest.mark.parametrize("started", [False, True])
def test_another_source_is_tried(web, tmp_path, mood, started):
    if started:
        half(tmp_path)
    web.bad_paths["/file"] = mood
    download([web.url, web.url.replace("/file", "/mirror")], SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and files(tmp_path) == ["file"]


def test_an_archive_is_not_decoded_on_the_way(web, tmp_path):
    """Some servers call a .tar.gz a .tar with Content-Encoding gzip."""
    web.moods = ["gzip"]
    packed = hashlib.sha256(gzip.compress(CONTENT, 1, mtime=0)).hexdigest()
    download([f"{web.url}.tar.gz"], packed, tmp_path / "file.tar.gz")
    assert gzip.decompress((tmp_path / "file.tar.gz").read_bytes()) == CONTENT


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "nonsense://127.0.0.1"])
def test_a_proxy_that_does_not_answer(web, tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(OSError, match="(?i)proxy") as caught:
        download(["http://example.invalid/file"], SHA256, tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_https_from_a_server_without_it(web, tmp_path):
    with pytest.raises(OSError, match="SSL"):
        download([web.url.replace("http:", "https:")], SHA256, tmp_path / "file")


def test_two_processes_end_with_one_good_file(web, tmp_path):
    web.moods = ["slow"]
    program = "import sys, pathlib; from llm_shared.download import download; download([sys.argv[1]], sys.argv[2], pathlib.Path(sys.argv[3]))"
    command = [sys.executable, "-c", program, web.url, SHA256, tmp_path / "file"]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "file").read_bytes() == CONTENT and files(tmp_path) == ["file"]
    assert web.starts == [0]  # one downloaded, the other waited


def test_killed_in_the_middle(web, tmp_path):
    web.moods = ["stall"]
    program = "import sys, pathlib; from llm_shared.download import download; download([sys.argv[1]], sys.argv[2], pathlib.Path(sys.argv[3]))"
    process = subprocess.Popen([sys.executable, "-c", program, web.url, SHA256, tmp_path / "file"])
    part = tmp_path / PART
    for _ in range(1000):
        if part.is_file() and part.stat().st_size:
            break
        threading.Event().wait(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "file").exists()
    download([web.url], SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and web.starts[-1] > 0


class FullFile:
    """An open file on a disk that takes so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, block):
        self.room -= len(block)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(block)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_a_full_disk_is_said_and_what_came_stays(web, cached, tmp_path, monkeypatch):
    real = open
    with monkeypatch.context() as full:
        full.setattr(
            "builtins.open",
            lambda path, mode="r": FullFile(real(path, mode), 1_000_000) if mode in ("ab", "wb") else real(path, mode),
        )
        with pytest.raises(OSError, match="No space left on device"):
            fetch("some/file")
    assert 900_000 < (tmp_path / "some" / PART).stat().st_size <= 1_000_000 and len(web.starts) == 1
    assert fetch("some/file").read_bytes() == CONTENT and web.starts[-1] > 900_000


@pytest.fixture
def cached(web, tmp_path, monkeypatch):
    """The cache is tmp_path, and fetch("some/file") would download from web."""
    monkeypatch.setattr(resources, "CACHE", tmp_path)
    monkeypatch.setitem(resources.DOWNLOADS, "some/file", Download(web.url, SHA256))
    monkeypatch.delenv("LLM_OFFLINE", raising=False)


def put(folder, content):
    path = folder / "some" / "file"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_copy_by_hand(web, cached, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_OFFLINE", "1")
    path = put(tmp_path, CONTENT)
    assert fetch("some/file") == path and web.starts == []
    path.write_bytes(bytes(len(CONTENT)))
    with pytest.raises(ValueError, match="file is not the expected file .*: delete it to download it again"):
        fetch("some/file")


@pytest.mark.parametrize(
    "content", [b"", CONTENT[:-1], CONTENT + b"x", b"<html>log in</html>", bytes(len(CONTENT))], ids=len
)
def test_a_wrong_copy_is_refused(web, cached, tmp_path, content):
    put(tmp_path, content)
    with pytest.raises(ValueError, match="is not the expected file") as caught:
        fetch("some/file")
    assert "\n" not in str(caught.value) and put(tmp_path, content).is_file() and web.starts == []


def test_a_mirror_is_tried(web, cached, tmp_path, monkeypatch):
    site = web.url.removesuffix("/file")
    monkeypatch.setattr(resources, "SITE", site)
    monkeypatch.setenv("HF_ENDPOINT", f"{site}/mirror")
    web.bad_paths["/mirror/file"] = 404
    assert fetch("some/file").read_bytes() == CONTENT and web.paths == ["/mirror/file", "/file"]


def test_a_file_stands_where_the_cache_should_be(web, cached, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.setattr(resources, "CACHE", tmp_path / "cache")
    with pytest.raises(OSError, match="cache") as caught:
        fetch("some/file")
    assert web.starts == [] and "\n" not in str(caught.value)


def test_a_folder_stands_where_the_file_should_be(web, cached, tmp_path):
    (tmp_path / "some" / "file").mkdir(parents=True)
    with pytest.raises(OSError, match="(?i)directory|access"):
        fetch("some/file")


PROGRAM = """
import pwd, sys
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody  # a user without an entry, as containers have them
from llm_shared import resources
try:
    print(resources.fetch(sys.argv[1]))
except OSError as error:
    print("error:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pwd")
@pytest.mark.parametrize(
    ("cache", "home", "name", "printed"),
    [
        (None, None, "moby-dick.txt", "moby-dick.txt"),
        ("", None, "sms-spam-collection.zip", "~/.cache/llm_shared/sms-spam-collection.zip is missing"),
        ("{}", None, "sms-spam-collection.zip", "{}/sms-spam-collection.zip is missing"),
        ("~/mine", "{}", "sms-spam-collection.zip", "{}/mine/sms-spam-collection.zip is missing"),
    ],
)
def test_where_the_cache_is(tmp_path, cache, home, name, printed):
    settings = {"LLM_CACHE": cache, "HOME": home, "LLM_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    given = {name: value.format(tmp_path) for name, value in settings.items() if value is not None}
    command = [sys.executable, "-c", PROGRAM, name]
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=tmp_path)
    assert printed.format(tmp_path) in done.stdout and done.stdout.count("\n") == 1, done.stdout + done.stderr


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
    with pytest.raises(OSError, match=r"could not download http.*404.*run again"):
        fetch("some/file")
    assert fetch("some/file").read_bytes() == CONTENT
    assert fetch("some/file") == tmp_path / "some/file" and len(web.starts) == 2

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llm_shared import resources
from llm_shared.resources import ASSETS, Download, fetch, replacing

CONTENT = b"weights" * 1000


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A local web server; it counts its visitors and can serve wrong bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            web.visits += 1
            self.send_response(200 if self.path == "/file" else 404)
            self.send_header("Content-Length", str(len(web.content)))
            self.end_headers()
            self.wfile.write(web.content)

        def log_message(self, *args):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.visits, web.content = 0, CONTENT
    threading.Thread(target=web.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{web.server_port}"
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr(resources, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(resources.DOWNLOADS, "some/file", Download(f"{url}/file", sha256))
    monkeypatch.setitem(resources.DOWNLOADS, "some/missing", Download(f"{url}/missing", sha256))
    monkeypatch.delenv("LLM_OFFLINE")
    yield web
    web.shutdown()


def test_bundled_files_are_those_of_the_datasheet():
    rows = [line.split("|") for line in (ASSETS / "README.md").read_text(encoding="utf-8").splitlines()]
    sheet = {row[1].strip(" `"): (int(row[5]), row[6].strip(" `")) for row in rows if len(row) > 6 and "`" in row[1]}
    bundled = {path.relative_to(ASSETS).as_posix() for path in ASSETS.rglob("*") if path.is_file()} - {
        "README.md",
        "README.en.md",
    }
    assert set(sheet) == bundled
    for name, (size, sha256) in sheet.items():
        content = fetch(name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)


def test_a_download_happens_once(web):
    path = fetch("some/file")
    assert path.read_bytes() == CONTENT and web.visits == 1
    assert fetch("some/file") == path and web.visits == 1


def test_wrong_bytes_leave_nothing(web):
    web.content = CONTENT[:-1]
    with pytest.raises(OSError, match="could not download some/file"):
        fetch("some/file")
    assert [path for path in resources.CACHE.rglob("*") if path.is_file()] == []
    web.content = CONTENT
    assert fetch("some/file").read_bytes() == CONTENT


def test_a_missing_file_is_said(web):
    with pytest.raises(OSError, match="could not download some/missing"):
        fetch("some/missing")


def test_offline_touches_no_network(web, monkeypatch):
    monkeypatch.setenv("LLM_OFFLINE", "1")
    with pytest.raises(OSError, match="LLM_OFFLINE=1 forbids"):
        fetch("some/file")
    assert web.visits == 0


def test_unknown_names():
    with pytest.raises(ValueError, match="no file is called 'nothing'; there are .*gpt2/vocab.bpe"):
        fetch("nothing")
    with pytest.raises(ValueError, match="no file is called"):
        fetch("../resources.py")


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file"
    with replacing(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("second, half")
        raise RuntimeError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    with pytest.raises(RuntimeError), replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "folder").exists()

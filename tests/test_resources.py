import hashlib
import os
import re
import subprocess
import sys
import threading
import time

from llm_shared import resources
from llm_shared.gpt import CONFIGS
from llm_shared.resources import ASSETS, DOWNLOADS, fetch, locked, replacing, write_safetensors
import pytest
import torch
from samples import ROOT


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


def test_unknown_names():
    with pytest.raises(ValueError, match="'nothing' does not exist, and is none of .*gpt2/vocab.bpe"):
        fetch("nothing")
    with pytest.raises(ValueError, match="does not exist"):
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


def put(path, content="new", ours=()):
    """Replace path by a file, or by a folder with one file for each letter of a set."""
    with replacing(path, ours) as temporary:
        if isinstance(content, set):
            temporary.mkdir()
            for name in content:
                (temporary / name).write_text("new")
        else:
            temporary.write_text(content)


@pytest.mark.parametrize(
    "name", ["x" * 250, "ế" * 80, "a [b] * ?c", "before", "new", ".lock", "deep/er/"], ids=lambda name: name[:9]
)
def test_any_name_can_be_replaced(tmp_path, name):
    path = tmp_path / "top" / name
    put(path)
    put(f"{path}{os.sep}", "newer")
    assert path.read_text() == "newer" and list(path.parent.iterdir()) == [path]
    path.unlink()
    for content in ({"a"}, {"a", "b"}):
        put(path, content, {"a"})
        assert {file.name for file in path.iterdir()} == content and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "error"), [({"a"}, "holds other files than those to replace, as mine"), ("file", "holds other files")]
)
def test_a_folder_of_the_readers_is_not_replaced(tmp_path, content, error):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=error):
        put(tmp_path / "there", content, {"a"})
    assert (tmp_path / "there" / "mine").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_what_stands_in_the_way_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for name, content in (("file", {"a"}), ("folder", "file")):
        with pytest.raises(OSError, match=name):
            put(tmp_path / name, content)
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path / "folder") == []
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "target")
    for content in ("first", "second"):
        put(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "target").read_text() == content


def test_an_interrupt_between_the_two_renames_undoes_the_first(tmp_path, monkeypatch):
    put(tmp_path / "folder", {"a"})
    (tmp_path / "folder" / "a").write_text("old")
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "folder", {"a"}, {"a"})
    assert (tmp_path / "folder" / "a").read_text() == "old" and os.listdir(tmp_path) == ["folder"]


KILLED = """
import os, signal, sys
from llm_shared import resources
replace, calls = os.replace, []
def killed(source, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
with resources.replacing(sys.argv[1], {"a"}) as temporary:
    temporary.mkdir()
    (temporary / "a").write_text("new")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_at_a_rename_loses_nothing(tmp_path, monkeypatch, rename):
    monkeypatch.setattr(resources, "YOUNG", -1)
    put(tmp_path / "folder", {"a"})
    (tmp_path / "folder" / "a").write_text("old")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "folder"), str(rename)]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    assert len(os.listdir(tmp_path)) == rename % 2 + 1
    with pytest.raises(RuntimeError), replacing(tmp_path / "folder", {"a"}):
        raise RuntimeError  # the next write, which fails
    assert (tmp_path / "folder" / "a").read_text() == "old" and os.listdir(tmp_path) == ["folder"]


def test_only_leftovers_of_the_dead_are_removed(tmp_path):
    old = time.time() - resources.YOUNG - 1
    (tmp_path / "file.0123.tmp").mkdir()  # it may not be locked yet
    for name in ("file.0123456789abcdef.tmp", "file.backup.tmp", "other.123.tmp", "my file.123.tmp"):
        (tmp_path / name / "new").mkdir(parents=True)
        os.utime(tmp_path / name, (old, old))
    with replacing(tmp_path / "file") as slow:
        slow.write_text("slow")
        os.utime(slow.parent.parent, (old, old))
        put(tmp_path / "file", "quick")
        assert (tmp_path / "file").read_text() == "quick" and slow.exists()
    assert (tmp_path / "file").read_text() == "slow"
    assert sorted(os.listdir(tmp_path)) == [
        "file",
        "file.0123.tmp",
        "file.backup.tmp",
        "my file.123.tmp",
        "other.123.tmp",
    ]


def test_threads_replace_the_same_file(tmp_path):
    errors = []

    def work(letter):
        try:
            for _ in range(8):
                put(tmp_path / "file", letter * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(set((tmp_path / "file").read_text())) == 1 and len(os.listdir(tmp_path)) == 1


def test_an_error_without_a_name_gets_one(tmp_path):
    for error in (OSError(28, "No space left on device"), OSError("48 requested and 0 written")):
        with pytest.raises(OSError, match=r"could not write .*loss\.png: ") as caught, replacing(tmp_path / "loss.png"):
            raise error
        assert str(error) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="^.Errno 2. No such file .*: 'text'"), replacing(tmp_path / "tokens"):
        os.stat("text")


@pytest.mark.skipif(sys.platform == "win32", reason="umask")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_rights_of_ordinary_ones(tmp_path, mask):
    before = os.umask(mask)
    try:
        open(tmp_path / "plain", "w").close()
        (tmp_path / "plain folder").mkdir()
        put(tmp_path / "file")
        put(tmp_path / "folder", {"a"})
        write_safetensors(tmp_path / "weights", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    rights = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert rights["file"] == rights["weights"] == rights["plain"] == (tmp_path / "folder" / "a").stat().st_mode
    assert rights["folder"] == rights["plain folder"]


def test_a_folder_is_locked_for_others_only(tmp_path):
    with locked(tmp_path), locked(tmp_path / "other"), pytest.raises(OSError, match="another process is writing to"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass


def test_every_download_is_pinned():
    models = {name: DOWNLOADS[f"{name}/model.safetensors"] for name in CONFIGS if name != "mini"}
    assert len(models) == 4
    for url, _ in models.values():
        assert re.search(r"/resolve/[0-9a-f]{40}/model\.safetensors$", url)
    for url, sha256 in DOWNLOADS.values():
        assert url.startswith("https://") and re.fullmatch("[0-9a-f]{64}", sha256)
    assert len({download.sha256 for download in DOWNLOADS.values()}) == len(DOWNLOADS)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes with names")
def test_only_files_and_folders_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no file or folder that can be replaced"):
        write_safetensors(tmp_path / "pipe", {"w": torch.zeros(1)})
    assert (tmp_path / "pipe").is_fifo()


def test_the_readers_own_tmp_folders_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "YOUNG", -1)
    for name in ("out.1.tmp", "out.2024.tmp", "out.bad.tmp"):
        (tmp_path / name).mkdir()
    write_safetensors(tmp_path / "out", {"w": torch.zeros(1)})
    assert sorted(os.listdir(tmp_path)) == ["out", "out.1.tmp", "out.2024.tmp", "out.bad.tmp"]

import gzip
import io
import os
import shutil
import struct
import tarfile
import zipfile

from llm_shared.archive import unpack
import pytest

KINDS = ["a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"]
ONE_OF_EACH = KINDS[:2]


def member(name, content=b"text", **fields):
    """Return a tar member; fields: type, linkname and so on."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


def make_archive(path, names, content="text"):
    """Write an archive of files with these names (folders, where one ends with a slash), and return its path."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                info = zipfile.ZipInfo("placeholder")
                info.filename = name  # not mended
                archive.writestr(info, b"" if name.endswith("/") else content)
    else:
        mode = "w:" + path.suffix.removeprefix(".").replace("tar", "")
        with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as archive:
            for name in names:
                kind = {"type": tarfile.DIRTYPE} if name.endswith("/") else {}
                archive.addfile(*member(name.rstrip("/"), b"" if kind else content.encode(), **kind))
    return path


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(archive, folder, error=ValueError, message="was not unpacked: "):
    """Check that an archive is refused in one line, and that nothing of it stays."""
    before = set(folder.parent.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        unpack(archive, folder)
    assert "\n" not in str(caught.value) and str(archive) in str(caught.value)
    assert set(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
def test_archives_are_unpacked(tmp_path, kind):
    names = [
        "./",
        "one.txt",
        "deep/",
        "deep/two.txt",
        "./deep/er/three",
        "luật.txt",
        "com10",
        ".hidden",
        "a b",
        "con.d/x",
    ]
    unpack(make_archive(tmp_path / kind, names[:-1]), tmp_path / "out")
    files = [name.removeprefix("./") for name in names[:-1] if not name.endswith("/")]
    assert tree(tmp_path / "out") == dict.fromkeys(files, b"text")


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt", "deep/../../evil.txt", "deep/../evil.txt", "/tmp/evil.txt", ".", "..", "",
    ],
)  # fmt: skip
def test_names_that_lead_out_are_refused(tmp_path, kind, name):
    refused(make_archive(tmp_path / kind, ["good.txt", name]), tmp_path / "out")


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize(
    "names",
    [
        ["a", "a"], ["a", "a/b"], ["a/b", "a"], ["a", "./a"], ["a/", "a"],
    ],
)  # fmt: skip
def test_two_members_of_one_name_are_refused(tmp_path, kind, names):
    refused(make_archive(tmp_path / kind, names), tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "../../outside"}, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "../outside"}, {"type": tarfile.LNKTYPE, "linkname": "missing"},
        {"type": tarfile.CHRTYPE}, {"type": tarfile.BLKTYPE}, {"type": tarfile.FIFOTYPE},
    ],
    ids=str,
)  # fmt: skip
def test_links_that_lead_out_and_devices_are_refused(tmp_path, fields):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(*member("good"))
        archive.addfile(*member("link", b"", **fields))
    refused(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_half_an_archive_leaves_nothing(tmp_path, kind):
    archive = make_archive(tmp_path / kind, [f"{i}.txt" for i in range(12)])
    whole = archive.read_bytes()
    end = 13 * 1024 - 512 if kind == "a.tar" else len(whole)  # after that only zeros follow, and are not missed
    for length in range(0, end - 1, max(1, len(whole) // 60) if kind != "a.tar" else 512):
        archive.write_bytes(whole[:length])
        refused(archive, tmp_path / "out", message="was not unpacked: .+")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_byte_is_noticed_or_does_no_harm(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # takes most of the time
    names = ["one.txt", "deep/two.txt", "three"]
    archive = make_archive(tmp_path / kind, names, "some text that repeats, some text that repeats" * 3)
    whole = archive.read_bytes()
    unpack(archive, tmp_path / "right")
    right = tree(tmp_path / "right")
    places = [1024 * i + j for i in range(3) for j in range(0, 345, 4)] if kind == "a.tar" else range(0, len(whole), 3)
    for place in places:  # of a plain .tar only the heads: it has no checksum of the content
        for change in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= change
            archive.write_bytes(damaged)
            try:
                unpack(archive, tmp_path / "out")
            except ValueError as error:
                assert "\n" not in str(error) and not (tmp_path / "out").exists(), place
            else:
                assert tree(tmp_path / "out") == right, place
                shutil.rmtree(tmp_path / "out")
    assert set(tmp_path.iterdir()) == {archive, tmp_path / "right"}


def bent_zip(path, at, value):
    """Write a zip archive whose only member has another 16-bit value in its head and in the list at the end."""
    content = bytearray(make_archive(path, ["good.txt"]).read_bytes())
    for signature, offset in ((b"PK\3\4", at), (b"PK\1\2", at + 2)):
        struct.pack_into("<H", content, content.index(signature) + offset, value)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value", "message"), [(6, 1, "encrypted"), (8, 99, "compression"), (8, 9, "compression")]
)
def test_zips_that_python_cannot_read(tmp_path, at, value, message):
    bent_zip(tmp_path / "a.zip", at, value)
    refused(tmp_path / "a.zip", tmp_path / "out", message=message)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"<html>log in</html>" * 100,
        b"PK\3\4",
        b"\x1f\x8b",
        b"BZh9",
        b"\xfd7zXZ\0",
        bytes(513),
        gzip.compress(b"hello"),
    ],
)
@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_what_is_no_archive(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, tmp_path / "out")


def test_a_missing_archive_and_a_folder(tmp_path):
    refused(tmp_path / "a.zip", tmp_path / "out", OSError, "No such file")
    (tmp_path / "b").mkdir()
    refused(tmp_path / "b", tmp_path / "out", OSError, "(?i)directory|denied")


def test_a_full_disk(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "a.zip", ["a"])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    refused(archive, tmp_path / "out", message="No space left")


def test_what_stands_there_already_stays(tmp_path):
    archive = make_archive(tmp_path / "a.zip", ["a"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == {"mine": b"mine"}

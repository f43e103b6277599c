import hashlib
import io
import re
import tarfile
import zipfile

import pytest

from llm_shared.gpt import CONFIGS
from llm_shared.resources import ASSETS, DOWNLOADS, fetch, replacing, unpack


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


def test_every_download_is_pinned():
    models = {name: DOWNLOADS[f"{name}/model.safetensors"] for name in CONFIGS if name != "mini"}
    assert len(models) == 4
    for url, _ in models.values():
        assert re.search(r"/resolve/[0-9a-f]{40}/model\.safetensors$", url)
    for url, sha256 in DOWNLOADS.values():
        assert url.startswith("https://") and re.fullmatch("[0-9a-f]{64}", sha256)
    assert len({download.sha256 for download in DOWNLOADS.values()}) == len(DOWNLOADS)


def make_archive(path, names):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "text")
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 4
                archive.addfile(member, io.BytesIO(b"text"))
    return path


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
def test_archives_are_unpacked(tmp_path, kind):
    unpack(make_archive(tmp_path / kind, ["one.txt", "deep/two.txt"]), tmp_path / "out")
    assert (tmp_path / "out/deep/two.txt").read_text() == "text"


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize("name", ["../evil.txt", "deep/../../evil.txt", "/tmp/evil.txt"])
def test_names_that_lead_out_are_refused(tmp_path, kind, name):
    archive = make_archive(tmp_path / kind, ["good.txt", name])
    if kind == "a.tar.gz" and name.startswith("/"):
        unpack(archive, tmp_path / "out")  # tar's own rule: the leading slash goes
        assert (tmp_path / "out" / name[1:]).is_file()
        return
    with pytest.raises(ValueError, match="was not unpacked") as caught:
        unpack(archive, tmp_path / "out")
    assert "\n" not in str(caught.value) and "evil.txt" in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("evil.txt"))


def test_links_that_lead_out_are_refused(tmp_path):
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "../../outside"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(link)
    with pytest.raises(ValueError, match="was not unpacked"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


def test_half_an_archive_leaves_nothing(tmp_path):
    for kind in ("a.zip", "a.tar.gz"):
        archive = make_archive(tmp_path / kind, [f"{i}.txt" for i in range(50)])
        archive.write_bytes(archive.read_bytes()[:-200])
        with pytest.raises(ValueError, match="was not unpacked"):
            unpack(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_damaged_archive_leaves_nothing(tmp_path):
    archive = make_archive(tmp_path / "a.tar.gz", [f"{i}.txt" for i in range(500)])
    content = bytearray(archive.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="was not unpacked"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()

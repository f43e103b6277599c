import hashlib
import re

import pytest

from llm_shared.gpt import CONFIGS
from llm_shared.resources import ASSETS, DOWNLOADS, fetch, replacing


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

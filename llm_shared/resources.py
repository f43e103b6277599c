"""setup · fetch(name): the one way to a file, bundled, cached or downloaded; and writing that never leaves half a file."""

import json
import os
import re
import secrets
import shutil
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_shared.download import download, hash_file

YOUNG = 60  # seconds within which a workshop may not be locked yet
ASSETS = Path(__file__).parent / "assets"
CACHE = Path(os.path.expanduser(os.environ.get("LLM_CACHE") or "~/.cache/llm_shared"))
SITE = "https://huggingface.co"
Download = namedtuple("Download", "url sha256")  # a file on the web, pinned to one revision and one content
PINNED = json.loads(Path(__file__).with_name("downloads.json").read_text(encoding="utf-8"))
DOWNLOADS = {name: Download(**pinned) for name, pinned in PINNED.items()}


def fetch(name):
    """Return the path of a file: bundled, cached, or downloaded unless LLM_OFFLINE=1; another name is a ValueError."""
    bundled = {path.relative_to(ASSETS).as_posix(): path for path in ASSETS.rglob("*.*") if path.suffix != ".md"}
    if name in bundled:
        return bundled[name]
    if name not in DOWNLOADS:
        raise ValueError(f"{name!r} does not exist, and is none of {', '.join(sorted([*bundled, *DOWNLOADS]))}")
    path, (url, sha256) = CACHE / name, DOWNLOADS[name]
    if not path.is_file():
        if os.environ.get("LLM_OFFLINE") == "1":
            raise OSError(f"{path} is missing and LLM_OFFLINE=1 forbids the download: unset it, or copy the file there")
        mirror = os.environ.get("HF_ENDPOINT", SITE).rstrip(
            "/"
        )  # the variable that sends transformers, too, to a mirror
        download([url.replace(SITE, mirror), url], sha256, path)
    verify(path, sha256)
    return path


def verify(path, sha256):
    """Raise a ValueError unless a file has this sha256; a note beside it saves reading it again before it changes."""
    note, state = path.with_name(f"{path.name}.sha256"), f"{sha256} {path.stat().st_size} {path.stat().st_mtime_ns}"
    if not note.is_file() or note.read_text(encoding="utf-8", errors="replace") != state:
        if hash_file(path) != sha256:
            raise ValueError(f"{path} is not the expected file (sha256 {sha256[:12]}…): delete it to download it again")
        with suppress(OSError):  # in a folder without writing it is read each time
            note.write_text(state, encoding="utf-8")


@contextmanager
def replacing(path, ours=()):
    """Yield a temporary path; what stands there at the end, file or folder, takes path's place, and its name, in one step.

    After an error path is what it was. A folder that holds other names than `ours` is not replaced: a ValueError.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is no file or folder that can be replaced")
    if path.is_dir() and (others := sorted(set(os.listdir(path)) - set(ours))):
        raise ValueError(f"{path} holds other files than those to replace, as {others[0]}: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name[:50]))
    workshop = path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.tmp")  # the length of a name is limited
    new, old = (workshop / kind / path.name for kind in ("new", "old"))
    try:
        with locked(workshop):
            new.parent.mkdir()
            old.parent.mkdir()
            yield new
            for file in filter(Path.is_file, [new, *new.rglob("*")]):
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())  # on the disk before it has the name, should the power fail
            if new.is_dir() and path.is_dir():  # no folder takes another one's name: that steps aside
                os.replace(path, old)
            os.replace(new, path)
    except OSError as error:
        if type(error) is OSError and path.name not in str(error):  # nameless, as of a full disk
            raise OSError(f"could not write {path}: {error}") from error
        raise
    finally:
        clear(workshop)


def clear(workshop):
    """Remove a workshop of `replacing`; a folder that had stepped aside for one that did not come gets its name back."""
    for old in workshop.glob("old/*"):
        with suppress(OSError):  # the new one has come
            os.rename(old, workshop.parent / old.name)
    shutil.rmtree(workshop, ignore_errors=True)


def remove_leftovers(folder, name):
    """Remove the workshops in which processes that have died were replacing a name; name: a regular expression."""
    for workshop in Path(folder).glob("*.tmp"):
        ours = re.fullmatch(rf"{name}\.[0-9a-f]{{16}}\.tmp", workshop.name)
        with suppress(OSError):  # somebody is at work there
            if ours and (any(workshop.glob("old/*")) or time.time() - workshop.stat().st_mtime > YOUNG):
                with locked(workshop):
                    pass
                clear(workshop)


def write_safetensors(path, weights, metadata=None):
    """Write {name: tensor} to a safetensors file: whole, or not at all. A failed write is an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"could not write {path}: {error}") from None
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)  # some versions of safetensors let only the owner read


@contextmanager
def locked(folder):
    """Keep a folder to this caller: while another one has it, an OSError. A process that dies gives it back."""
    import filelock

    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(Path(folder) / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise OSError(f"another process is writing to {folder}: wait for it, or choose another folder") from None

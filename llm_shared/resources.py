"""setup · fetch(name): the one way to a file, bundled, cached or downloaded; and writing that never leaves half a file."""

import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from llm_shared.download import download, verify

YOUNG = 60  # seconds within which a workshop may not be locked yet
ASSETS = Path(__file__).parent / "assets"
CACHE = Path(os.environ.get("LLM_CACHE") or "~/.cache/llm_shared")  # "~" is looked up later: not everybody has a home


class Download(NamedTuple):
    """A file on the web, pinned to one revision and one content."""

    url: str
    sha256: str


SITE = "https://huggingface.co"
HUB = f"{SITE}/openai-community"
DOWNLOADS = {
    "gpt2-small (124M)/model.safetensors": Download(
        f"{HUB}/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/model.safetensors",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium (355M)/model.safetensors": Download(
        f"{HUB}/gpt2-medium/resolve/6dcaa7a952f72f9298047fd5137cd6e4f05f41da/model.safetensors",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large (774M)/model.safetensors": Download(
        f"{HUB}/gpt2-large/resolve/32b71b12589c2f8d625668d2335a01cac3249519/model.safetensors",
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "gpt2-xl (1558M)/model.safetensors": Download(
        f"{HUB}/gpt2-xl/resolve/15ea56dee5df4983c59b2538573817e1667135e2/model.safetensors",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
    "sms-spam-collection.zip": Download(
        "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
    ),
}


def fetch(name):
    """Return the path of the file called name: bundled with the package, else cached, else downloaded; verified.

    With LLM_OFFLINE=1 nothing is downloaded. A name that nobody knows, or another file of that name in the cache, is
    a ValueError, a failed download an OSError.
    """
    bundled = {
        path.relative_to(ASSETS).as_posix(): path for path in sorted(ASSETS.rglob("*.*")) if path.suffix != ".md"
    }
    if name in bundled:
        return bundled[name]
    if name not in DOWNLOADS:
        raise ValueError(f"{name!r} does not exist, and is none of {', '.join([*bundled, *DOWNLOADS])}")
    try:
        cache = CACHE.expanduser()
    except RuntimeError:
        raise OSError(f"there is no place for {CACHE}: set LLM_CACHE to a folder for downloads") from None
    path, (url, sha256) = cache / name, DOWNLOADS[name]
    if not path.is_file():
        if os.environ.get("LLM_OFFLINE") == "1":
            raise OSError(
                f"{name} is not in {cache} and LLM_OFFLINE=1 forbids the download: unset it, or copy the file there"
            )
        mirror = os.environ.get("HF_ENDPOINT", SITE)  # the variable that sends transformers, too, to a mirror
        try:
            download(list(dict.fromkeys([url.replace(SITE, mirror), url])), sha256, path)
        except OSError as error:
            advice = "check the connection" if error.errno is None else "make room, or set LLM_CACHE to another folder,"
            raise OSError(f"could not download {name} from {url}: {error}; {advice} and run again") from None
    verify(path, sha256)
    return path


@contextmanager
def replacing(path, ours=()):
    """Yield a temporary path; what stands there at the end, file or folder, takes path's place, and its name, in one step.

    After an error path is what it was, and nothing else is left. What a killed process left behind is removed first.
    A folder is replaced if it holds the names `ours` and no others; else, or if it is the current one, a ValueError.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        if others := sorted(set(os.listdir(path)) - set(ours)):
            raise ValueError(f"{path} holds other files than those to replace, as {others[0]}: choose another folder")
        if Path.cwd().is_relative_to(path):
            raise ValueError(f"{path} is the current folder, which cannot be replaced: choose one inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name[:50]))
    workshop = path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.tmp")  # the length of a name is limited
    temporary = workshop / "new" / path.name
    try:
        with locked(workshop):
            temporary.parent.mkdir()
            yield temporary
            for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
                with open(file, "rb+" if os.name == "nt" else "rb") as written:
                    os.fsync(written.fileno())  # on the disk before it has the name, should the power fail
            if temporary.is_dir() and path.is_dir():  # no folder takes another one's name: that steps aside
                os.replace(path, workshop / "before")
            os.replace(temporary, path)
    except OSError as error:
        if type(error) is OSError and path.name not in str(error):  # nameless, as of a full disk
            raise OSError(f"could not write {path}: {error}") from error
        raise
    finally:
        clear(workshop)


def clear(workshop):
    """Remove a workshop of `replacing`; a folder that had stepped aside for one that did not come gets its name back."""
    before = workshop / "before"
    with suppress(FileNotFoundError):  # another process may do the same
        for late in (workshop / "new").glob("*"):
            if before.exists() and not (workshop.parent / late.name).exists():
                os.replace(before, workshop.parent / late.name)
    shutil.rmtree(workshop, ignore_errors=True)


def remove_leftovers(folder, name):
    """Remove the workshops in which processes that have died were replacing a name; name: a regular expression."""
    for old in Path(folder).glob("*.tmp"):
        if re.fullmatch(rf"{name}\.[0-9a-f]+\.tmp", old.name) and old.is_dir():
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > YOUNG:
                    with locked(old):  # else somebody is at work there
                        pass
                    clear(old)


def write_safetensors(path, weights, metadata=None):
    """Write {name: tensor} to a safetensors file: whole, or not at all. A failed write is an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        temporary.touch()
        rights = temporary.stat().st_mode
        try:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"could not write {path}: {error}") from None
        temporary.chmod(rights)  # some versions of safetensors let only the owner read


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

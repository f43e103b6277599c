"""setup · fetch(name): the one way to a file, bundled, cached or downloaded; and writing that never leaves half a file."""

import errno
import os
import re
import shutil
import tarfile
import unicodedata
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from llm_shared.download import download, verify

ASSETS = Path(__file__).parent / "assets"
CACHE = Path(os.environ.get("LLM_CACHE") or "~/.cache/llm_shared")  # "~" is looked up later: not everybody has a home


class Download(NamedTuple):
    """A file on the web, pinned to one revision and one content."""

    url: str
    sha256: str


HUB = "https://huggingface.co/openai-community"
MIRRORS = {"https://huggingface.co": "https://hf-mirror.com"}  # the second copies the first
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
        urls = [url, *(url.replace(hub, mirror) for hub, mirror in MIRRORS.items() if url.startswith(hub))]
        try:
            download(urls, sha256, path)
        except OSError as error:
            advice = "check the connection" if error.errno is None else "make room, or set LLM_CACHE to another folder,"
            raise OSError(f"could not download {name} from {url}: {error}; {advice} and run again") from None
    verify(path, sha256)
    return path


@contextmanager
def replacing(path):
    """Yield a temporary path beside path; what stands there at the end, file or folder, takes path's name in one step.

    After an error it is deleted, and path is what it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*") if temporary.is_dir() else [temporary]):
            with open(file, "rb+") as written:
                os.fsync(written.fileno())  # on the disk before it has the name, should the power fail
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


# One part of a name that works on every system: Windows has devices, drives and forbidden characters.
SAFE = re.compile(r"(?i)(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))[^/\\:*?\"<>|\x00-\x1f]*[^/\\:*?\"<>|\x00-\x1f. ]")


def check_members(members, folder):
    """Raise a ValueError unless an archive's members, (name, size, is a folder), fit into folder, on every system."""
    files, folders = [], set()
    for name, _, is_folder in members:
        parts = PurePosixPath(unicodedata.normalize("NFC", name).casefold()).parts
        if not all(map(SAFE.fullmatch, parts)):
            raise ValueError(f"{name!r} leads out of the folder, or is no name on every system")
        files += [parts] * (not is_folder)
        folders |= {parts[:i] for i in range(len(parts) + is_folder)}
    if not files or len(set(files)) < len(files) or not folders.isdisjoint(files):
        raise ValueError("it holds no file, or two members of one name, large and small letters aside")
    if (needed := sum(size for _, size, _ in members)) > shutil.disk_usage(folder).free:
        raise ValueError(f"it needs {needed:,} bytes, more than the disk has left")


def unpack(archive, folder):
    """Extract a .zip or .tar archive to a folder that does not exist yet: all of it, or nothing.

    An archive that is damaged, or holds a link or a name that leads out of the folder, is a ValueError.
    """
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    members = [(info.filename, info.file_size, info.is_dir()) for info in file.infolist()]
                    check_members(members, temporary)
                    file.fp.seek(-12 - len(file.comment), os.SEEK_END)  # where their number stands, 0xFFFF for more
                    if int.from_bytes(file.fp.read(2), "little") != min(len(members), 0xFFFF):
                        raise ValueError("its list of members is damaged")
                    file.extractall(temporary)
            else:
                with tarfile.open(archive) as file:
                    check_members([(info.name, info.size, info.isdir()) for info in file.getmembers()], temporary)
                    file.fileobj.seek(file.offset)  # for tarfile a damaged member is the end, but that is made of zeros
                    rest = list(map(any, iter(lambda: file.fileobj.read(tarfile.BLOCKSIZE), b"")))
                    if any(rest) or not rest:
                        raise ValueError("it is damaged or cut short")
                    file.extractall(temporary, filter="data")
    except Exception as error:  # a damaged archive makes its reader stumble over anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # over the disk
        raise ValueError(f"{archive} was not unpacked: {error}".splitlines()[0]) from None

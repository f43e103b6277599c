"""setup · fetch(name): the one way to a file, bundled, cached or downloaded; and writing that never leaves half a file."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ASSETS = Path(__file__).parent / "assets"
CACHE = Path(os.environ.get("LLM_CACHE", Path.home() / ".cache" / "llm_shared"))


class Download(NamedTuple):
    """A file on the web, pinned to one revision and one content."""

    url: str
    sha256: str


DOWNLOADS = {
    "gpt2-small (124M)/model.safetensors": Download(
        "https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/model.safetensors",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
}


def fetch(name):
    """Return the path of the file called name: bundled with the package, else cached, else downloaded and verified.

    With LLM_OFFLINE=1 nothing is downloaded. A name that nobody knows is a ValueError, a failed download an
    OSError; a file whose sha256 is not the pinned one is thrown away.
    """
    bundled = {
        path.relative_to(ASSETS).as_posix(): path for path in sorted(ASSETS.rglob("*.*")) if path.suffix != ".md"
    }
    if name in bundled:
        return bundled[name]
    if name not in DOWNLOADS:
        raise ValueError(f"no file is called {name!r}; there are {', '.join([*bundled, *DOWNLOADS])}")
    url, sha256 = DOWNLOADS[name]
    path = CACHE / name
    if not path.is_file() and os.environ.get("LLM_OFFLINE") == "1":
        raise OSError(
            f"{name} is not in {CACHE} and LLM_OFFLINE=1 forbids the download: unset it, or copy the file there"
        )
    import pooch

    try:  # into a temporary name, verified, then renamed
        return Path(pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, progressbar=True))
    except Exception as error:
        raise OSError(f"could not download {name} from {url}: {error}; check the connection and run again") from error


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
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            with open(file, "rb+") as written:
                os.fsync(written.fileno())  # on the disk before it has the name, should the power fail
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise

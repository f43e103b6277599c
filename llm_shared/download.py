"""setup · download(): a file from the web, resumed after every interruption, verified, under its name only when whole."""

import contextlib
import hashlib
import os
import re
import time

TIMEOUT = 30  # seconds without a byte before a connection counts as dead
TRIES = 5  # connections in a row that bring next to nothing before giving up
LITTLE = 1 << 16  # bytes; fewer are next to nothing
LONGEST_PAUSE = 60  # seconds, whatever a server asks for
BUSY = (408, 425, 429)  # refusals below 500 after which another try makes sense


def download(urls, sha256, path):
    """Write the file at the addresses urls to path, verified by sha256; what came of it waits beside it, as .part.

    A connection that dies, stalls or is put off is taken up again where it stopped, at the next address. Of two
    processes, one waits for the other. What cannot be had, or has another content everywhere, is an OSError.
    """
    import filelock
    import requests

    part, anew = (path.with_name(f"{path.name}.{sha256[:8]}.{kind}") for kind in ("part", "new"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        urls, failures, mixed = list(urls), 0, False
        while not path.is_file():  # another process may just have brought it
            url, before = urls[failures % len(urls)], size(part)
            try:
                came = receive(url, part, anew)
                if hash_file(came) == sha256:
                    os.replace(came, path)
                    break
                came.unlink()
                if came == anew or not before or mixed:
                    raise ValueError(f"its content is not the expected one (sha256 {sha256[:12]}…): it was thrown away")
                mixed = True  # an older piece may be to blame: once more, from the start
            except (requests.RequestException, ValueError) as error:
                failures = 0 if size(part) - before >= LITTLE else failures + 1
                seconds = pause(error, failures)
                urls = urls if seconds is not None else [other for other in urls if other != url]
                if not urls or failures == TRIES:
                    raise OSError(str(error)) from None
                time.sleep(seconds or 0)
            finally:
                anew.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def receive(url, part, anew):
    """Append to part what it lacks of the file at url; return part.

    A server that begins at the first byte again writes to anew, which then is returned: it may be another thing.
    """
    import requests
    from tqdm import tqdm

    start = size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if start and response.status_code == 416:
            return part  # nothing follows: part is whole
        response.raise_for_status()
        said = response.headers
        if "text/html" in said.get("Content-Type", ""):
            raise requests.RequestException("a web page came instead: does the network ask for a login in the browser?")
        begin = int(re.match(r"bytes (\d+)-|", said.get("Content-Range", ""))[1] or 0)
        if begin not in (0, start) or (begin and "Content-Encoding" in said):
            part.unlink()
            raise requests.RequestException(f"asked to go on at byte {start}, the server went on at {begin}")
        if url.endswith(".gz"):
            response.raw.headers.pop("Content-Encoding", None)  # some servers mean the file itself
        total = begin + int(said.get("Content-Length", 0)) or None
        target = part if begin == start else anew
        bar = tqdm(desc=part.stem, initial=begin, total=total, unit="B", unit_scale=True)
        with bar, open(target, "ab" if begin else "wb") as file:
            for block in response.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
        return target


def pause(error, failures):
    """Return the seconds before the next try, as the server asks or one more each time; None: it would fail again."""
    response = getattr(error, "response", None)
    status = 500 if response is None else response.status_code
    if isinstance(error, ValueError) or (status < 500 and status not in BUSY):
        return None
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(int(asked), LONGEST_PAUSE) if asked.isdecimal() else failures


def size(path):
    """Return the size of a file in bytes, 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def hash_file(path):
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path, sha256):
    """Raise a ValueError unless the file has this sha256; a note beside it saves reading it again before it changes."""
    note = path.with_name(f"{path.name}.sha256")
    state = f"{sha256} {path.stat().st_size} {path.stat().st_mtime_ns}".encode()
    if note.is_file() and note.read_bytes() == state:
        return
    if hash_file(path) != sha256:
        raise ValueError(f"{path} is not the expected file (sha256 {sha256[:12]}…): delete it to download it again")
    with contextlib.suppress(OSError):  # in a folder without writing it is read each time
        note.write_bytes(state)

"""setup · download(): a file from the web, resumed after every interruption, verified, under its name only when whole."""

import hashlib
import os
import time

TIMEOUT = 30  # seconds without a byte before a connection counts as dead
TRIES = 5  # connections in a row that bring next to nothing before giving up
LITTLE = 1 << 16  # bytes; fewer are next to nothing
LONGEST_PAUSE = 60  # seconds, whatever a server asks for
BUSY = (408, 425, 429)  # refusals below 500 after which another try makes sense


def download(urls, sha256, path):
    """Write the file that one of urls has to path: resumed, verified by sha256, whole or not at all; else an OSError."""
    import filelock
    import requests

    part = path.with_name(f"{path.name}.{sha256[:8]}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        failures = 0
        while not path.is_file():  # another process may just have brought it
            url, before = urls[failures % len(urls)], size(part)
            try:
                receive(url, part)
                if hash_file(part) != sha256:
                    part.unlink()
                    blame = requests.RequestException if before else ValueError  # an older piece, or the server
                    raise blame(f"its content is not the expected one (sha256 {sha256[:12]}…): it was thrown away")
                os.replace(part, path)
            except (requests.RequestException, ValueError) as error:
                failures = 0 if size(part) - before >= LITTLE else failures + 1
                seconds = pause(error, failures)
                if seconds is None:
                    urls = [other for other in urls if other != url]
                if not urls or failures == TRIES:
                    raise OSError(f"could not download {url}: {error}; check the connection and run again") from None
                time.sleep(seconds or 0)


def receive(url, part):
    """Append to part what it lacks of the file at url; a server that cannot go on there begins it anew."""
    import requests
    from tqdm import tqdm

    start = size(part)
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if start and response.status_code == 416:
            return  # nothing follows: part is whole
        response.raise_for_status()
        if "text/html" in response.headers.get("Content-Type", ""):
            raise requests.RequestException("a web page came instead: does the network ask for a login in the browser?")
        if url.endswith(".gz"):
            response.raw.headers.pop("Content-Encoding", None)  # some servers mean the file itself
        begin = start if response.status_code == 206 else 0
        total = begin + int(response.headers.get("Content-Length", 0)) or None
        if not begin and total and total <= start:  # what anew would be shorter than what is there already
            raise requests.RequestException(f"{total} bytes came instead of more than {start}")
        bar = tqdm(desc=part.stem, initial=begin, total=total, unit="B", unit_scale=True)
        with bar, open(part, "ab" if begin else "wb") as file:
            for block in response.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))


def pause(error, failures):
    """Return the seconds before the next try, as the server asks or one more each time; None: it would fail again."""
    response = getattr(error, "response", None)
    status, asked = (500, "") if response is None else (response.status_code, response.headers.get("Retry-After", ""))
    if isinstance(error, ValueError) or (status < 500 and status not in BUSY):
        return None
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

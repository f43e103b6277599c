"""setup · download(): a file from the web, resumed after every interruption, verified, under its name only when whole."""

import hashlib
import os
import time

TIMEOUT = 30  # seconds without a byte before a connection counts as dead
TRIES = 5  # connections in a row that bring nothing before giving up


def download(url, sha256, path):
    """Write the file at url to path, verified by sha256; what an interrupted try brought waits in path + ".part".

    A connection that dies or stalls is taken up again where it stopped. Of two processes, one waits for the other.
    What cannot be had, or has another content, is an OSError.
    """
    import filelock
    import requests

    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if path.is_file():
            return  # another process has just brought it
        failures = 0
        while True:
            before = part.stat().st_size if part.is_file() else 0
            try:
                receive(url, part, before)
                break
            except requests.RequestException as error:
                came = part.is_file() and part.stat().st_size > before
                failures = 0 if came else failures + 1
                refused = error.response is not None and error.response.status_code < 500
                if refused or failures == TRIES:
                    raise OSError(str(error)) from None
                time.sleep(failures)
        if hash_file(part) != sha256:
            part.unlink()
            raise OSError(f"its content is not the expected one (sha256 {sha256[:12]}…), so it was thrown away")
        os.replace(part, path)


def receive(url, part, start):
    """Append what follows byte number start of the file at url to part; from a server that cannot go on, all of it."""
    import requests
    from tqdm import tqdm

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            return  # nothing follows: part is whole
        response.raise_for_status()
        start = start if response.status_code == 206 else 0
        total = start + int(response.headers.get("Content-Length", 0)) or None
        bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True)
        with bar, open(part, "ab" if start else "wb") as file:
            for block in response.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))


def hash_file(path):
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

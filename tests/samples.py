"""What tests share: where the repository is, a text with everything in it, and the check of an error line."""

import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MIXED_TEXT = (
    "Hello, world! It's 3:30pm and they'll say we're done.\n\n  def f(x):\n\treturn x**2  # ½ ² Ⅷ ٣\r\n"
    "Việt Nam có Hà Nội và Đà Nẵng. Vie\u0323\u0302t (NFD). Tiếng Việt viết thế nào?\n"
    "日本語と中文。 ไทย 한국어 العربية 👩‍👩‍👧‍👦 🇻🇳 \u00a0\u2003\u3000 \x00\x1c\x1f\x85 '' 's 'S ’s   \n"
)


def one_line(process, message):
    """Check that a script ended with status 1 and one line that holds message."""
    assert process.returncode == 1, process.stdout + process.stderr
    assert message in process.stderr, process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr


@contextmanager
def files_of_at_most(size):
    """A disk that is full after size bytes of each file."""
    resource = pytest.importorskip("resource", reason="Windows cannot limit a process's files")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

"""What tests share: where the repository is, a text with everything in it, and the check of an error line."""

from pathlib import Path

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

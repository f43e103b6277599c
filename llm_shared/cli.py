"""setup · How the chapter scripts start and fail: UTF-8 output, numbers that make sense, one clear line for bad input."""

import argparse
import contextlib
import math
import os
import re
import signal
import sys
from types import SimpleNamespace

ADVICE = {  # what the name or the text of an error holds: what the reader can do
    "MemoryError|out of memory|allocate memory|not enough memory|ALLOC_FAILED|size calculation overflowed": (
        "there is not enough memory: try a smaller --batch-size, --context-length, --max-new-tokens or --model"
    ),
    r"C\+\+ compil|working triton": "--compile found no compiler that works: install one, such as g++, or leave it out",
}


def number(kind, allowed, words):
    """Return a type for argparse: text → int or float, or an error that says, with words, which numbers are allowed."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return parse


positive_int = number(int, lambda n: 1 <= n < 2**31, "a whole number from 1 to 2,147,483,647")
natural = number(int, lambda n: 0 <= n < 2**63, "a whole number of at least 0")
positive_float = number(float, lambda x: 0 < x < math.inf, "a number above 0")
non_negative = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")


def run(main, *args, **options):
    """Call main; a bad input becomes one line on stderr and exit status 1. `python -X dev` shows the traceback instead."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # Vietnamese, on any console
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which cleans up
    try:
        main(*args, **options)
        sys.stdout.flush()  # so that a full disk is found here
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except Exception as error:
        text = explain(error)
        if sys.flags.dev_mode or text is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # else Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"error: {text}")  # head has what it wanted


def explain(error):
    """Return one line about an error, with advice where there is some; None: it is a fault of the program."""
    for pattern, advice in ADVICE.items():
        if re.search(pattern, f"{type(error).__name__} {error}"):
            return advice
    return " ".join(str(error).split()) if isinstance(error, (OSError, ValueError, FloatingPointError)) else None


def log(text):
    """Write what tqdm puts over the last line as a line of its own."""
    if text.strip():
        print(text.strip(), file=sys.stderr, flush=True)


def progress(steps, **options):
    """Return tqdm(steps, …); in a log file it writes a line every few seconds, where a terminal shows one bar that moves."""
    from tqdm import tqdm

    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        options |= {"file": SimpleNamespace(write=log), "mininterval": 5}
    return tqdm(steps, **options)

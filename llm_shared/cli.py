"""setup · How the chapter scripts start and fail: UTF-8 output, one clear line for bad input."""

import sys


def run(main, *args, **options):
    """Call main; a bad input becomes one line on stderr and exit status 1. `python -X dev` shows the traceback instead."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # Vietnamese, on any console
    try:
        main(*args, **options)
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (OSError, ValueError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"error: {error}")

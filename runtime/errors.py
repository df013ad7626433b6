"""Errors for people: one line that says what is wrong, where, and what to do."""

import sys


def fail(message: str):
    """Ends the program for a user's mistake: one line on standard error, exit status 2."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    print(f"nanoOEC: {printable}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"

"""Errors for people: one line that says what is wrong, where, and what to do."""

import atexit
import os
import select
import signal
import sys
import time


def end_cleanly():
    """Sets how a command ends: Ctrl-C prints one line, a closed pipe (`| head -1`) nothing. Escapes what the terminal cannot
    print. Call it first."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where they are closed
        stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _end
    atexit.register(_flush)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell starts `command &` with Ctrl-C ignored
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame):
    """Raises KeyboardInterrupt. In an import it ends the process instead: C code that imports, as torch does with numpy, drops the
    exception and continues with half a module."""
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"nanoOEC: stopped\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _end(kind: type, error: BaseException, trace):
    if issubclass(kind, BrokenPipeError) and _nobody_listens():  # errors of the program's own pipes are reported
        os._exit(141)  # 128 + SIGPIPE, as in a shell
    cause = error
    while cause and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__  # an error while cleaning up hides it
    if cause is None:
        return sys.__excepthook__(kind, error, trace)
    os.write(2, b"nanoOEC: stopped\n")
    if not issubclass(kind, KeyboardInterrupt):
        _flush()
        os._exit(130)


def _nobody_listens() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are reported in any case
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _flush():
    """Flushes standard output, and ignores a closed pipe, which Python would report at exit."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(message: str):
    """Prints. Where standard output is a closed pipe or a full disk, the work continues without it."""
    try:
        print(message, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str):
    """Ends the program for a user's mistake: one line on standard error, exit status 2."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # where process 0 makes the same mistake, its message is enough: torchrun then ends this process
    print(f"nanoOEC: {printable}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"

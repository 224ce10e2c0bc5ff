"""How each of the programs begins and ends: its log, its standard streams, and the one line if it cannot go on.

An answer that cannot be written is a failure of its command. What was done is done:
if only the word of it cannot be written, the exit status is still that of the deed.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Callable, NoReturn, Optional, TextIO, Union

from ..errors import ConfigurationError
from ..text import one_line

if TYPE_CHECKING:
    from ..system.user import User
    from .options import LogOptions

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_ADVICE = {
    errno.EMFILE: " (ulimit -n is too low)",
    errno.ENFILE: " (the computer has no more of them: see fs.file-max)",
    errno.ENOMEM: " (see ulimit -v, and the memory that is free)",
}


def begin(program: str, log: LogOptions, file_mode: Optional[int], user: Optional[User]) -> None:
    """Have files that are made get *file_mode* and belong to *user*, and lines of the log go where *log* says.

    Raises `ConfigurationError` if that is a file which cannot be opened.
    """
    from .. import log_turns, logs
    from ..making import set_file_mode, set_owner

    if file_mode is not None:
        set_file_mode(file_mode)
    if user is not None:
        set_owner((user.uid, user.gid))
    stderr = not (log.path or log.syslog)
    log_turns.prepare()
    logs.set_up(program, path=log.path, syslog=log.syslog, stderr=stderr, level=log.level, as_json=log.as_json)


def run_program(program: str, body: Callable[[], int], complain: Optional[Callable[[str], None]] = None) -> NoReturn:
    """Do *body*, and leave with the status that it returns; if it fails, *complain* says why in one line."""
    complain = complain or (lambda message: say(f"{program}: {message}"))
    try:
        status = body()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except ConfigurationError as error:
        complain(one_line(f"{error}{_advice(error.__cause__)}"))
        status = error.exit_status
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (OSError, MemoryError) as error:
        complain(one_line(trouble(error)))
        status = 1
    _settle(sys.stdout)
    _settle(sys.stderr)
    sys.exit(status)


def trouble(error: BaseException) -> str:
    """What the operating system does not give, and what to do about it."""
    if not isinstance(error, OSError):
        return f"cannot go on: no memory{_ADVICE[errno.ENOMEM]}"
    if error.errno == errno.ENOENT and str(error.filename).startswith(("/proc/", "/sys/")):
        return f"cannot go on without {error.filename}: mount /proc"
    where = f" {error.filename}" if error.filename else ""
    return f"cannot go on:{where} {error.strerror or error}{_advice(error)}"


def _advice(cause: Optional[BaseException]) -> str:
    if not isinstance(cause, OSError):
        return ""
    return _advice_on_size() if cause.errno == errno.EFBIG else _ADVICE.get(cause.errno or 0, "")


def _advice_on_size() -> str:
    import resource

    is_limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return " (ulimit -f is too low)" if is_limited else " (the file system has no files of that size)"


def say(line: str) -> None:
    """A line on standard error, as far as that takes one."""
    if sys.stderr is None:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def print_answer(output: Union[str, bytes]) -> bool:
    """What was asked for; False if the reader has seen enough. Raises `ConfigurationError` if it cannot be written."""
    error = _write(output)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise ConfigurationError(f"cannot write the answer: {error.strerror}")
    return error is None


def terminal_encoding() -> Optional[str]:
    """That of standard output, if standard input and output are a terminal that can show more than lines."""
    streams = (sys.stdin, sys.stdout)
    if os.environ.get("TERM", "dumb") == "dumb" or not all(
        stream is not None and stream.isatty() for stream in streams
    ):
        return None
    return sys.stdout.encoding


def print_outcome(text: str) -> None:
    """The word of what was done."""
    error = _write(text)
    if error is not None and not isinstance(error, BrokenPipeError):
        say(f"cannot write to standard output: {error.strerror}; what was asked for goes on, or is done")


def _write(output: Union[str, bytes]) -> Optional[OSError]:
    """Write on standard output; what went wrong, the first time."""
    stream = sys.stdout
    if stream is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - /dev/null, see `process.keep_standard_streams`
        return OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        if isinstance(output, bytes):
            stream.buffer.write(output)
        else:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
            stream.write(output)
        stream.flush()
    except OSError as error:
        _give_up(stream)
        return error
    return None


def _settle(stream: Optional[TextIO]) -> None:
    """Python flushes once more at its end, and leaves with a status of its own if that fails."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        _give_up(stream)


def _give_up(stream: Optional[TextIO]) -> None:
    """Let *stream* lead nowhere from now on."""
    if stream is None:
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)

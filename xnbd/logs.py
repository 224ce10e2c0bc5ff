"""Where log lines go: standard error or output, a file, syslog.

A log file may be moved away at any time; every process opens it again by itself.
Whatever a message quotes, it stays one line.

Where lines are JSON (``json_lines.py``) they have fields, too. A process has a *subject*: what all of its lines
are about from some moment on, such as its client. A single line says more with ``extra=about(...)``.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
import time
from contextlib import contextmanager, suppress
from typing import IO, Dict, Iterator, List, Optional

from .errors import ConfigurationError
from .making import open_or_make
from .text import one_line

log = logging.getLogger("xnbd")

Fields = Dict[str, object]
"""What a line is about, by name: ``export``, ``peer``, ``identity``, ``command``, ``offset``, ``length``, ``errno``."""

_subject: Fields = {}


def set_subject(**fields: object) -> None:
    """What all lines of this process are about from now on, besides what it was before; None takes a field away."""
    _subject.update(fields)
    for name in [name for name, value in _subject.items() if value is None]:
        del _subject[name]


def about(*, error: Optional[BaseException] = None, **fields: object) -> Dict[str, Fields]:
    """For ``extra`` of one line: what it is about, besides the subject of its process; of an *error* the number."""
    number = getattr(error, "errno", None)
    if number:
        fields["errno"] = errno.errorcode.get(number, number)
    return {"about": {name: value for name, value in fields.items() if value is not None}}


def set_up(program: str, *, path: Optional[str], syslog: bool, stderr: bool, level: int, as_json: bool = False) -> None:
    """Send the lines of all of this program's modules to the chosen places.

    Raises `ConfigurationError` if the file at *path* cannot be opened.
    """
    formatter = _json_formatter(program) if as_json else _text_formatter(program)
    handlers: List[logging.Handler] = []
    if path is not None:
        stream = standard_stream(path)
        handlers.append(_file_handler(path) if stream is None else _stream_handler(stream))
    if stderr:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(formatter)
    if syslog:
        handlers.append(_SyslogHandler(program, formatter if as_json else _Formatter()))
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = False
    logging.raiseExceptions = False
    logging.logThreads = logging.logMultiprocessing = False


def _text_formatter(program: str) -> logging.Formatter:
    formatter = _Formatter(f"%(asctime)s {program}[%(process)d] %(levelname)s: %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    return formatter


def _json_formatter(program: str) -> logging.Formatter:
    from .json_lines import JsonFormatter

    return JsonFormatter(program, _subject)


class _Formatter(logging.Formatter):
    """What a message quotes may have line ends and escapes; a traceback of our own keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def standard_stream(path: str) -> Optional[int]:
    """The descriptor of ``/dev/stdout`` or ``/dev/stderr``: a pipe or a socket perhaps, which has no other name."""
    return {"/dev/stdout": 1, "/dev/stderr": 2}.get(path)


def _stream_handler(fd: int) -> logging.Handler:
    return logging.StreamHandler(open(fd, "a", encoding="utf-8", errors="backslashreplace", closefd=False))


def reopen() -> None:
    """Open the log file again, as after it was moved away. Raises `ConfigurationError`; then the old one stays."""
    for handler in log.handlers:
        again = getattr(handler, "open_again", None)
        if again is not None:
            again()


def _file_handler(path: str) -> logging.Handler:
    from logging.handlers import WatchedFileHandler

    class LogFile(WatchedFileHandler):
        def _open(self) -> IO[str]:  # type: ignore[override]
            return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=open_log)

        def emit(self, record: logging.LogRecord) -> None:
            with suppress(OSError):  # where its directory may not be looked into, the file that is open will do
                self.reopenIfNeeded()
            try:
                logging.FileHandler.emit(self, record)
            except OSError:
                self.handleError(record)  # it cannot be opened again: lines are lost until it can be

        def open_again(self) -> None:
            with _told(path):
                stream = self._open()
            with suppress(OSError):  # on a full disk the lines in its buffer are lost
                if self.stream:
                    self.stream.close()
            self.stream = stream  # type: ignore[assignment]
            self._statstream()

    with _told(path):
        return LogFile(path)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Raises `ConfigurationError` if the log file *path* cannot be opened."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            message = f"log file {path} is a symbolic link, which is not followed: name the file itself"
        elif error.errno in (errno.ENXIO, errno.ESPIPE):
            message = f"log file {path} is a pipe or a socket: name a file, or /dev/stdout or /dev/stderr"
        else:
            message = f"cannot open log file {path}: {error.strerror}"
        raise ConfigurationError(message) from error


def open_log(path: str, flags: int) -> int:
    """A descriptor of a log file, which is no symbolic link, and nothing that waits for a reader. Raises `OSError`."""
    fd = open_or_make(path, flags & ~os.O_CREAT | os.O_NONBLOCK)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE), path)
    os.set_blocking(fd, True)
    return fd


class Seldom:
    """Lines of one kind, at most one in *interval* seconds; how many were left out the next one says."""

    def __init__(self, interval: float = 1.0) -> None:
        self._interval = interval
        self._next = 0.0
        self._left_out = 0

    def log(self, level: int, message: str, *arguments: object, extra: Optional[Dict[str, Fields]] = None) -> None:
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        self._next = now + self._interval
        left_out, self._left_out = self._left_out, 0
        more = f" (and {left_out} more like this since the last line)" if left_out else ""
        log.log(level, f"{message}%s", *arguments, more, extra=extra)


class ToldOnce:
    """The failures of what is tried again and again: each is told once, until it is another one or has passed."""

    def __init__(self) -> None:
        self._last = ""

    def log(self, level: int, failure: str, extra: Optional[Dict[str, Fields]] = None) -> None:
        if failure != self._last:
            log.log(level, "%s", failure, extra=extra)
        self._last = failure

    def passed(self) -> None:
        """It was tried with success: the same failure would be news."""
        self._last = ""


class _SyslogHandler(logging.Handler):
    """The C library's ``syslog(3)``: it needs no connection and survives forks and restarts of the daemon."""

    def __init__(self, program: str, formatter: logging.Formatter) -> None:
        super().__init__()
        import syslog

        self.setFormatter(formatter)
        self._syslog = syslog
        syslog.openlog(program, syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        levels = ((logging.ERROR, self._syslog.LOG_ERR), (logging.WARNING, self._syslog.LOG_WARNING),
                  (logging.INFO, self._syslog.LOG_INFO))  # fmt: skip
        priority = next((p for level, p in levels if record.levelno >= level), self._syslog.LOG_DEBUG)
        for line in self.format(record).splitlines():
            self._syslog.syslog(priority, line.encode("utf-8", "backslashreplace").decode())


def complain(program: str, message: str, *, super_server: bool) -> None:
    """Say why the program ends: on standard error, and wherever else the log goes.

    Under a *super_server* standard error may lead nowhere, and syslog has to do. Where
    lines of JSON go to standard error, this is one of them.
    """
    try:
        if sys.stderr is not None and not any(map(_is_json_on_stderr, log.handlers)):
            print(f"{program}: {message}", file=sys.stderr, flush=True)
    except OSError:
        pass  # full, or nobody reads it
    if super_server and not log.handlers:
        log.addHandler(_SyslogHandler(program, _Formatter()))
    for handler in log.handlers:
        if getattr(handler, "stream", None) is not sys.stderr or _is_json_on_stderr(handler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "%s", (message,), None))


def _is_json_on_stderr(handler: logging.Handler) -> bool:
    stream = handler.stream if isinstance(handler, logging.StreamHandler) else None
    if stream is None or not getattr(handler.formatter, "is_json", False):
        return False
    return bool(stream is sys.stderr or stream.fileno() == 2)

"""Where log lines go: standard error, a file, syslog.

A log file may be moved away at any time; every process opens it again by itself.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from typing import IO, List, Optional

from .errors import ConfigurationError
from .making import open_or_make

log = logging.getLogger("xnbd")


def set_up(program: str, *, path: Optional[str], syslog: bool, stderr: bool, level: int) -> None:
    """Send the lines of all of this program's modules to the chosen places.

    Raises `ConfigurationError` if the file at *path* cannot be opened.
    """
    formatter = logging.Formatter(f"%(asctime)s {program}[%(process)d] %(levelname)s: %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    handlers: List[logging.Handler] = []
    if path is not None:
        handlers.append(_file_handler(path))
    if stderr:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(formatter)
    if syslog:
        handlers.append(_SyslogHandler(program))
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = False
    logging.raiseExceptions = False
    logging.logThreads = logging.logMultiprocessing = False


def _file_handler(path: str) -> logging.Handler:
    from logging.handlers import WatchedFileHandler

    class LogFile(WatchedFileHandler):
        def _open(self) -> IO[str]:  # type: ignore[override]
            return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=open_log)

        def emit(self, record: logging.LogRecord) -> None:
            try:
                super().emit(record)
            except OSError:
                self.handleError(record)  # it cannot be opened again: lines are lost until it can be

    try:
        return LogFile(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            message = f"log file {path} is a symbolic link, which is not followed: name the file itself"
        else:
            message = f"cannot open log file {path}: {error.strerror}"
        raise ConfigurationError(message) from error


def open_log(path: str, flags: int) -> int:
    """A descriptor of a log file, which is no symbolic link."""
    return open_or_make(path, flags & ~os.O_CREAT)


class _SyslogHandler(logging.Handler):
    """The C library's ``syslog(3)``: it needs no connection and survives forks and restarts of the daemon."""

    def __init__(self, program: str) -> None:
        super().__init__()
        import syslog

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

    Under a *super_server* standard error may lead nowhere, and syslog has to do.
    """
    print(f"{program}: {message}", file=sys.stderr)
    if super_server and not log.handlers:
        log.addHandler(_SyslogHandler(program))
    for handler in log.handlers:
        if type(handler) is not logging.StreamHandler:
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "%s", (message,), None))

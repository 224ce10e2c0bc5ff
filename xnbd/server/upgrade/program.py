"""Which program a server or wrapper runs: how it was started, and how the next one is."""

from __future__ import annotations

import os
import re
import stat
import sys
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ...errors import CommandError

_HIDDEN = re.compile(r"--take-over(-check)?=(\d+)")
"""First word of a command line that one program gives to the next one. Others take it for a mistake."""

TAKE_OVER, CHECK = "--take-over", "--take-over-check"


class TakeOver(NamedTuple):
    """This program has to go on with the estate in *fd*, or, with *check*, to say whether it could."""

    fd: int
    check: bool


def split_words(words: Sequence[str]) -> Tuple[Optional[TakeOver], List[str]]:
    """What the program before has put in front of a command line, if anything, and the command line itself."""
    found = _HIDDEN.fullmatch(words[0]) if words else None
    if found is None:
        return None, list(words)
    return TakeOver(int(found[2]), bool(found[1])), list(words[1:])


class Program(NamedTuple):
    """The program and its command line: executed are *start*, a word of ours, and *words*."""

    start: List[str]
    words: List[str]
    directory: Optional[str]
    """To which paths in *words* belong; None: it was gone already."""
    kind: str = "server"
    """What it is."""

    @classmethod
    def own(cls, words: Sequence[str], kind: str = "server") -> Program:
        """The one that runs here. To be called before the process gets a title or another working directory."""
        try:
            directory: Optional[str] = os.getcwd()
        except FileNotFoundError:
            directory = None
        return cls(_own_start(directory), list(words), directory, kind)

    def at(self, path: Optional[str]) -> Program:
        """The one at *path*, if that is given, with the same command line. Raises `CommandError`."""
        start = self.start if path is None else [path]
        for file in start[:1] if len(start) == 1 else (start[0], start[-1]):
            _refuse_unusable(file)
        return self._replace(start=start)

    @property
    def path(self) -> str:
        return self.start[-1]

    def command(self, word: str, fd: int) -> List[str]:
        """What to execute; *word* is `TAKE_OVER` or `CHECK`."""
        return [*self.start, f"{word}={fd}", *self.words]


def _refuse_unusable(path: str) -> None:
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"the server cannot look at the program {path}: {why}") from error
    if not is_file:
        raise CommandError(f"there is no program {path}: install it, or name another one with --program")


def _own_start(directory: Optional[str]) -> List[str]:
    """The script, if its first line has started it; else the interpreter with its options, and the script."""
    with open("/proc/self/cmdline", "rb") as line:
        words = [os.fsdecode(word) for word in line.read().split(b"\0")[:-1]]
    given = sys.argv[0]
    script = given if directory is None else os.path.join(directory, given)
    before = words[: len(words) - len(sys.argv)]
    if os.access(script, os.X_OK) and before == _first_line(script):
        return [script]
    return [sys.executable or os.readlink("/proc/self/exe"), *before[1:], script]


def _first_line(script: str) -> List[str]:
    """What the kernel, and perhaps ``env``, make of a script's first line: the words before the script's name."""
    with open(script, "rb") as file:
        line = file.readline(512)
    if not line.startswith(b"#!"):
        return []
    words = os.fsdecode(line[2:].strip()).split(None, 1)
    if words and os.path.basename(words[0]) == "env":
        return [word for word in " ".join(words[1:]).split() if word != "-S"]
    return words

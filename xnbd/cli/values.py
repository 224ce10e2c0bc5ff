"""Command lines: from words to options, and from the text of values to numbers, or a line that says what is wrong.

docopt's dictionary stays in here: `CommandLine` is what the other modules of this package make their options of.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from contextlib import contextmanager
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union, cast

from ..errors import ConfigurationError
from ..making import OWNER_ONLY, WIDEST

USAGE_ERROR = 2

_SIZE = re.compile(r"(\d+)([KMGTPE]?)(?:I?B)?", re.IGNORECASE)
_LARGEST_SIZE = (1 << 63) - 1

Value = Union[None, bool, str, List[str]]


class CommandLine:
    """Options and arguments by their names, as they stand on a command line that fits the usage text.

    What makes a number of a value raises `ConfigurationError` if it is none.
    """

    def __init__(self, values: Dict[str, Value], places: Optional[Mapping[str, str]] = None) -> None:
        """*places* tells where values come from that stand elsewhere."""
        self._values = values
        self._places = places or {}

    def amended(self, entries: Mapping[str, Tuple[str, str]]) -> CommandLine:
        """The same with other values for some options; beside each value stands what messages call its place."""
        values = {name: value for name, (value, _) in entries.items()}
        return CommandLine({**self._values, **values}, {name: place for name, (_, place) in entries.items()})

    def knows(self, name: str) -> bool:
        """Whether the usage text has it."""
        return name in self._values

    def has(self, name: str) -> bool:
        """Whether it is given, or has a default."""
        return bool(self._values[name])

    def text(self, name: str) -> Optional[str]:
        value = self._values[name]
        return value if isinstance(value, str) else None

    def texts(self, name: str) -> List[str]:
        """The values of an option that may be given several times, each once: docopt repeats some of them itself."""
        return list(dict.fromkeys(cast(List[str], self._values[name])))

    def needed(self, name: str) -> str:
        """The value of what the usage text demands or has a default for; so too in the methods that follow."""
        return cast(str, self._values[name])

    def integer(self, name: str, lowest: int, highest: int) -> int:
        return parse_integer(self.needed(name), self._place(name), lowest, highest)

    def seconds(self, name: str) -> float:
        return parse_seconds(self.needed(name), self._place(name))

    def size(self, name: str) -> int:
        """In bytes."""
        return parse_size(self.needed(name), self._place(name))

    def size_or_zero(self, name: str) -> int:
        return 0 if self.needed(name).strip() == "0" else self.size(name)

    def _place(self, name: str) -> str:
        return self._places.get(name, name)

    def mode(self, name: str) -> int:
        return parse_mode(self.needed(name), name)

    def rename(self, old_names: Mapping[str, str]) -> None:
        """Move the values of options to today's names. Raises `ConfigurationError` if both names are given."""
        for old, new in old_names.items():
            self.refuse_together(old, [new])
            value = self._values.pop(old)
            if value is not None:
                self._values[new] = value

    def refuse_together(self, first: str, others: Sequence[str]) -> None:
        """Raises `ConfigurationError` if option *first* is given with one of *others*."""
        if not self.has(first):
            return
        for other in others:
            if self.has(other):
                raise ConfigurationError(f"{first} and {other} do not go together", USAGE_ERROR)


def parse_command_line(program: str, usage: str, argv: List[str], version: str) -> CommandLine:
    """What docopt makes of *argv*; help and version are printed and end the program.

    Raises `ConfigurationError` for a command line that does not fit *usage*.
    """
    try:
        from docopt import DocoptExit, docopt
    except ImportError:
        raise ConfigurationError(
            f"{sys.executable} lacks the module docopt: contrib/setup makes a .venv/bin/{program} that has all it needs"
        ) from None
    try:
        with _printing():
            values: Dict[str, Value] = dict(docopt(usage, argv, version=version))
    except DocoptExit as error:
        reason = _reason(error, usage, argv)
        raise ConfigurationError(f"{reason} ({program} --help shows the usage)", USAGE_ERROR) from None
    for name, value in values.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise ConfigurationError(f"{name} is empty ({program} --help shows the usage)", USAGE_ERROR)
    return CommandLine(values)


@contextmanager
def _printing() -> Iterator[None]:
    """Raises `ConfigurationError` if what is printed inside cannot be; a reader who has seen enough is none."""
    try:
        try:
            yield
        except SystemExit as end:
            if sys.stdout is None and not end.code:  # what there was to print went nowhere
                raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
            raise
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        raise ConfigurationError(f"cannot write to standard output: {error.strerror}") from error


def _reason(error: BaseException, usage: str, argv: List[str]) -> str:
    """docopt's own reason where it has a short one, else what can be found out about *argv*."""
    first = str(error).strip().partition("\n")[0]
    if not argv:
        return "nothing to do"
    for word in argv:
        option = _option(word)
        end = "" if option.startswith("--") else r"(?![\w-])"  # long ones may be abbreviated
        if option.startswith("-") and not re.search(rf"(?<![\w-]){re.escape(option)}{end}", usage):
            return f"there is no option {option}"
    if not first or first.lower().startswith(("usage:", "warning:")):
        return f"these arguments do not fit together: {' '.join(argv)}; {_expected(usage, argv)}"
    return first


def _expected(usage: str, argv: List[str]) -> str:
    """The first line of *usage* that has one of the commands in *argv*, or the commands, one of which is missing."""
    options = [_long_form(usage, _option(word)) for word in argv if word.startswith("-")]
    forms = {form: re.findall(r"--[\w-]+", re.sub(r"\[.*?\]", "", form)) for form in _forms(usage)}
    for form, commands in forms.items():
        if any(command.startswith(option) for option in options for command in commands):
            return f"expected {form}"
    for form, commands in forms.items():
        if not commands:
            return f"expected {form}"
    return f"expected one of {', '.join(dict.fromkeys(command for commands in forms.values() for command in commands))}"


def _option(word: str) -> str:
    """The option in *word*, without its value, or the first of several letters."""
    return word.partition("=")[0] if word.startswith("--") else word[:2]


def _long_form(usage: str, option: str) -> str:
    """What *usage* has the letter *option* stand for."""
    found = re.search(rf"^ +{re.escape(option)}(?: [A-Z]+)?, (--[\w-]+)", usage, re.MULTILINE)
    return found[1] if found else option


def _forms(usage: str) -> List[str]:
    """The command lines of *usage*, each in one line, but those of --help and --version."""
    lines = usage.partition("Usage:\n")[2].partition("\n\n")[0]
    forms = [" ".join(form.split()) for form in re.split(r"\n  (?! )", f"\n{lines}") if form]
    return [form for form in forms if not form.endswith((" --help", " --version"))]


def parse_size(text: str, option: str) -> int:
    """Bytes of a size like ``512M`` or ``1G`` (powers of 1,024). Raises `ConfigurationError`."""
    match = _SIZE.fullmatch(text.strip())
    if match:
        size = int(match[1]) << (10 * " KMGTPE".index(match[2].upper() or " "))
        if 0 < size <= _LARGEST_SIZE:
            return size
    raise ConfigurationError(f"{option} {text}: expected a size like 512M, 1G or 4096", USAGE_ERROR)


def parse_integer(text: str, option: str, lowest: int, highest: int) -> int:
    """Raises `ConfigurationError` unless *text* is a whole number between the bounds."""
    if len(text) < 20 and text.strip().isdecimal() and lowest <= int(text) <= highest:
        return int(text)
    raise ConfigurationError(f"{option} {text}: expected a whole number from {lowest} to {highest}", USAGE_ERROR)


def parse_mode(text: str, option: str) -> int:
    """The permissions of a file, in octal. Raises `ConfigurationError`."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = 0
    if mode & OWNER_ONLY == OWNER_ONLY and not mode & ~WIDEST:
        return mode
    raise ConfigurationError(f"{option} {text}: expected permissions from 0600 to 0666, in octal", USAGE_ERROR)


def parse_seconds(text: str, option: str) -> float:
    """Raises `ConfigurationError` unless *text* is a time above nothing and below a year."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if 0 < seconds < 365 * 86400:
        return seconds
    raise ConfigurationError(f"{option} {text}: expected a number of seconds above 0", USAGE_ERROR)


def refuse_same_file(paths: Mapping[str, str]) -> None:
    """Raises `ConfigurationError` if two of *paths*, by what they are for, are one file.

    A file can have several names: links of both kinds are seen through.
    """
    found: Dict[object, str] = {}
    for name, path in paths.items():
        for identity in _identities(path):
            other = found.setdefault(identity, name)
            if other != name:
                raise ConfigurationError(
                    f"{other} and {name} are the same file, {path}: each needs its own", USAGE_ERROR
                )


def _identities(path: str) -> Iterator[object]:
    """What a file that is at *path*, or will be, has in common with no other."""
    yield os.path.realpath(path)
    try:
        status = os.stat(path)
    except OSError:
        return
    if not stat.S_ISCHR(status.st_mode):  # /dev/null is everybody's
        yield status.st_dev, status.st_ino

"""A terminal with a shell in it, by tmux: what is typed there, and what can be read on its screen."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Optional

from server_process import PATIENCE, children_of, wait_until

PROMPT = "ready: "


class Screen:
    """Of so many *columns* and *rows*; the shell works in *directory*."""

    def __init__(self, directory: Path, columns: int = 80, rows: int = 24) -> None:
        self._directory = directory
        shell = f"env PS1='{PROMPT}' LC_ALL=C.UTF-8 bash --norc --noprofile -i"
        self._tmux("new-session", "-d", "-x", columns, "-y", rows, shell)
        self.wait_for(rf"^{PROMPT.strip()}")

    def _tmux(self, *arguments: object) -> str:
        # A short path, or a socket cannot be there.
        command = ["tmux", "-u", "-S", "screen", "-f", os.devnull, *map(str, arguments)]
        environment = {key: value for key, value in os.environ.items() if key != "TMUX"}
        done = subprocess.run(
            command, cwd=self._directory, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def type(self, line: str) -> None:
        """A line for the shell."""
        self._tmux("send-keys", "-l", line)
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Keys, by the names that tmux has for them."""
        self._tmux("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", "-x", columns, "-y", rows)

    def text(self) -> str:
        return self._tmux("capture-pane", "-p")

    def is_as_before(self) -> bool:
        """Whether it is the shell's own screen, with a cursor."""
        return self._tmux("display-message", "-p", "#{alternate_on} #{cursor_flag}").split() == ["0", "1"]

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """Until *pattern* is on the screen."""
        found: Optional[re.Match[str]] = None

        def is_there() -> bool:
            nonlocal found
            found = re.search(pattern, self.text(), re.MULTILINE)
            return found is not None

        try:
            wait_until(is_there, f"{pattern!r} on the screen", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.text()}") from None
        assert found is not None
        return found

    def program(self) -> int:
        """The process id of what the shell has started."""
        shell = int(self._tmux("display-message", "-p", "#{pane_pid}"))
        wait_until(lambda: bool(children_of(shell)), "a program in the terminal")
        return children_of(shell)[0]

    def close(self) -> None:
        subprocess.run(
            ["tmux", "-S", "screen", "kill-server"], cwd=self._directory, stderr=subprocess.DEVNULL, timeout=60
        )

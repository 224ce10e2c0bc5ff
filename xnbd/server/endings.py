"""Why a process has ended, for the log."""

from __future__ import annotations

import signal


def reason_of(exit_code: int) -> str:
    """*exit_code* is that of `os.waitstatus_to_exitcode`."""
    return f"killed by {_signal_name(-exit_code)}" if exit_code < 0 else f"exit status {exit_code}"


def _signal_name(number: int) -> str:
    """The name of a signal; those of real time have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

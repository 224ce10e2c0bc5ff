"""What can go wrong in a benchmark."""

from __future__ import annotations


class BenchmarkError(Exception):
    """Nothing can be measured; the message says what to do."""

    exit_status = 1


class UsageError(BenchmarkError):
    """The command line makes no sense."""

    exit_status = 2


class ProbeFailed(Exception):
    """One sample could not be taken; the run goes on without it, and ends with status 1."""

"""A process goes ahead of others for a moment, if it may."""

from __future__ import annotations

import os
import resource

import pytest

from xnbd.system.urgency import urgent


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def test_it_is_over_after_the_moment() -> None:
    usual = priority()
    may = os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 30 - usual
    with urgent():
        assert priority() == (usual - 10 if may else usual)
    assert priority() == usual


def test_who_may_not_goes_on_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, who: int, value: int) -> None:
        raise PermissionError(13, "Permission denied")

    usual = priority()
    monkeypatch.setattr(os, "setpriority", refuse)
    with urgent():
        assert priority() == usual

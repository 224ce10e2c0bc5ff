"""contrib/migration: a virtual machine moves, with its disk, while it works."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import List

import pytest
from exported import MODES
from server_process import ROOT, run

WAYS: List[List[str]] = [["--shared-storage"]] + [[]] * ("proxy" in MODES)


@pytest.mark.guest
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "shared storage" if way else "proxy")
def test_machine_moves_with_its_disk(tmp_path: Path, way: List[str]) -> None:
    _, out, err = run(sys.executable, ROOT / "contrib/migration/demo.py", "--dir", tmp_path, *way, timeout=540)
    assert err == ""
    assert out.splitlines()[-1] == "every block is right, in the machine and in the destination's image"
    print(out)


def test_machine_is_not_moved_to_a_proxy_that_has_cached_something() -> None:
    bgctl = """sh -c 'echo "{\\"blocks\\": {\\"cached\\": 3}}"'"""
    script = ROOT / "contrib/migration/migrate.py"
    status, out, err = run(
        sys.executable, script, "--bgctl", bgctl, "A.qmp", "B.qmp", "tcp:host2:4444", "ctl", check=False
    )
    assert (status, out) == (1, "")
    assert err.startswith("migrate.py: the proxy has cached blocks already (3)")
    assert err.count("\n") == 1

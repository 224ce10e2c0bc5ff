"""What contrib/check and contrib/release rely on: which tests may be tried again, git's hooks, usage texts."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import List, Tuple

import pytest
from server_process import ROOT, run

SCRIPT = ROOT / "contrib" / "known_flaky.py"
LIST = ROOT / "tests" / "known_flaky.txt"
LISTED = "tests/test_migration.py::test_machine_moves_with_its_disk[proxy]"
OTHER = "tests/test_smoke.py::test_nbdinfo"


def ask(tmp_path: Path, *failed: str) -> Tuple[int, str, str]:
    path = tmp_path / "lastfailed"
    path.write_text(json.dumps(dict.fromkeys(failed, True)))
    return run(sys.executable, SCRIPT, path, check=False)


def test_listed_test_may_try_again_and_its_reason_is_printed(tmp_path: Path) -> None:
    status, out, err = ask(tmp_path, LISTED)
    assert (status, err) == (0, "")
    assert out.startswith(f"  {LISTED}: qemu without KVM")


@pytest.mark.parametrize("failed", [[OTHER], [LISTED, OTHER]], ids=len)
def test_other_test_may_not(tmp_path: Path, failed: List[str]) -> None:
    status, out, err = ask(tmp_path, *failed)
    assert (status, err) == (1, "")
    assert f"  {OTHER}: not in tests/known_flaky.txt" in out


def test_folder_of_a_test_does_not_matter(tmp_path: Path) -> None:
    assert ask(tmp_path, LISTED.replace("tests/", "tests/guest/"))[0] == 0


def test_every_listed_test_exists_and_has_a_reason() -> None:
    entries = [line for line in LIST.read_text().splitlines() if not line.startswith("#")]
    for entry in entries:
        found = re.fullmatch(r"(test_\w+\.py)::(test_\w+)  \S.+", entry)
        assert found, entry
        assert any(f"def {found[2]}(" in path.read_text() for path in (ROOT / "tests").rglob(found[1])), entry


def test_hooks_of_git_run_what_the_checks_run() -> None:
    hooks = re.findall(r"entry: ([^,]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    checks = re.findall(r"(?m)^run (\.venv/bin/.+)$", (ROOT / "contrib" / "check").read_text())
    assert hooks == checks


@pytest.mark.parametrize("program", ["server", "bgctl", "wrapper", "wrapper_ctl"])
def test_usage_is_understood_by_debian_s_docopt_too(program: str) -> None:
    """docopt 0.6 takes each line that begins with a dash as an option's description, so none may begin so twice."""
    usage = importlib.import_module(f"xnbd.cli.{program}").__doc__ or ""
    first_words = re.findall(r"(?m)^ *(--[\w-]+)", usage)
    assert first_words
    assert len(set(first_words)) == len(first_words), first_words
    assert not re.findall(r"(?m)^ *--[\w-]+", usage.partition("Usage:\n")[2].partition("\n\n")[0])


def test_a_venv_goes_on_to_see_what_it_sees(tmp_path: Path) -> None:
    """As one for Ceph: its binding is a package of the system's. The checkout here is one of nothing, to be quick."""
    (tmp_path / "contrib").mkdir()
    shutil.copy(ROOT / "contrib" / "setup", tmp_path / "contrib")
    (tmp_path / "setup.py").write_text('import setuptools\nsetuptools.setup(name="nothing", py_modules=[])\n')
    run("/usr/bin/python3", "-m", "venv", "--without-pip", "--system-site-packages", tmp_path / ".venv")
    run(tmp_path / "contrib" / "setup")
    assert "include-system-site-packages = true" in (tmp_path / ".venv" / "pyvenv.cfg").read_text()
    assert (tmp_path / ".venv" / "bin" / "pip").exists()

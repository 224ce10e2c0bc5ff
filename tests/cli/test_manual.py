"""The manual pages against what the programs say of themselves."""

from __future__ import annotations

import re
from typing import Set

import pytest
from server_process import PYTHON, ROOT, run

PROGRAMS = ("xnbd-server", "xnbd-bgctl", "xnbd-wrapper", "xnbd-wrapper-ctl")


def options_in(text: str) -> Set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", text))


@pytest.mark.parametrize("program", PROGRAMS)
def test_manual_page_explains_every_option(program: str) -> None:
    _, usage, _ = run(PYTHON, "-W", "error", ROOT / "bin" / program, "--help")
    source = (ROOT / "contrib" / "man" / f"{program}.8").read_text()
    page = re.sub(r"\\f.", "", source).replace("\\-", "-")
    assert "--help" in options_in(usage)
    assert options_in(usage) - options_in(page) == set()


def test_readme_explains_no_option_that_is_not_there() -> None:
    usages = "".join(run(PYTHON, "-W", "error", ROOT / "bin" / program, "--help")[1] for program in PROGRAMS)
    table = re.findall(r"^``(--.+?)``,? ", (ROOT / "README.rst").read_text(), re.MULTILINE)
    assert len(table) > 20
    assert options_in(" ".join(table)) - options_in(usages) == set()

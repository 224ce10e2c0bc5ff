"""``contrib/doc/architecture.rst`` shows the tree as it is: a module that is not there is one that nobody finds."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = ROOT.joinpath("contrib/doc/architecture.rst").read_text()
MODULES = {path.name for path in ROOT.joinpath("xnbd").rglob("*.py") if path.name != "__init__.py"}


def test_every_module_is_in_the_tree() -> None:
    assert not {name for name in MODULES if not re.search(rf"(?<![a-z_]){name}", TEXT)}


def test_no_module_is_named_that_is_not_there() -> None:
    elsewhere = {path.name for part in ("contrib", "tests") for path in ROOT.joinpath(part).rglob("*.py")}
    assert not set(re.findall(r"(?<![a-z_])[a-z][a-z_]*\.py", TEXT)) - MODULES - elsewhere

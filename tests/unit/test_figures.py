"""The families of metrics: names by Prometheus' rules, and each of them explained."""

from __future__ import annotations

import os
import re

import pytest
from scraping import check_by_promtool
from server_process import ROOT

from xnbd.metrics.exposition import plain
from xnbd.scoreboard.tally import PLACES, ROWS, Sums
from xnbd.server.observer.figures import About, CacheNow, Exposed, LimitNow, OriginNow, families

GUIDE = (ROOT / "contrib/doc/operations.rst").read_text()


def everything() -> Exposed:
    sums = Sums()
    sums.include({row.name: [1] * row.places for row in ROWS})
    origins = [OriginNow("nbd://a:1/", up=True, latency=0.5, sent=1)]
    cache = CacheNow(1, 1, 1.0, copying=True, copied_bytes=1, reads_through=True, origins=origins, written_bytes=1)
    cache = cache._replace(limit=LimitNow(3, 2, 1))
    return Exposed("disk", sums, 1, 1, True, cache)


FAMILIES = families([everything()], About("xnbd-server", os.getpid(), 1, [("file", 1.0, 0.0)]))


def test_promtool_finds_nothing_wrong() -> None:
    assert check_by_promtool(plain(FAMILIES)) == ""


SUFFIXES = {"counter": "_total", "info": "_info"}
NAMES = {family.name + SUFFIXES.get(family.kind, "") for family in FAMILIES}


def test_every_metric_is_explained_to_operators() -> None:
    """In a paragraph of its own or of several metrics, which begins with their names and has text below."""
    heads = re.findall(r"^(``xnbd_.*)\n    \S", GUIDE, re.MULTILINE)
    explained = re.findall(r"``(xnbd_\w+)``", "\n".join(heads))
    assert sorted(explained) == sorted(NAMES)
    assert len(NAMES) == len(FAMILIES) > 25


@pytest.mark.parametrize("path", ["contrib/doc/operations.rst", "contrib/prometheus/xnbd.rules.yml"])
def test_no_other_metric_is_named(path: str) -> None:
    of_histograms = {f"{family.name}_bucket" for family in FAMILIES if family.kind == "histogram"}
    assert set(re.findall(r"\bxnbd_\w+", (ROOT / path).read_text())) <= NAMES | of_histograms


def test_names_end_with_their_units() -> None:
    for family in FAMILIES:
        assert family.name.startswith("xnbd_")
        assert not family.unit or family.name.endswith(f"_{family.unit}")
        assert family.help.endswith(".")


def test_all_that_is_counted_is_told() -> None:
    told = "".join(str(family.samples) for family in FAMILIES)
    assert told
    for row in set(PLACES) - {"export_length", "nanoseconds"}:
        sums = Sums()
        sums.include({row: [7] * next(r.places for r in ROWS if r.name == row)})
        exposed = everything()._replace(sums=sums)
        without = everything()._replace(sums=Sums())
        about = About("xnbd-server", os.getpid(), 1, [])
        assert families([exposed], about) != families([without], about), row

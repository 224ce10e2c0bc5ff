"""What a look at /status asks for, and the parts of an answer that are made for it."""

from __future__ import annotations

import pytest

from xnbd.server.observer.wanted import Wanted, parse_wanted, rounded


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("", Wanted()),
        ("map=12", Wanted(cells=12)),
        ("usage=0", Wanted(usage=False)),
        ("durations=1&map=16384", Wanted(cells=16384, durations=True)),
        ("export=a%26b%20%e2%82%ac", Wanted(export="a&b €")),
        ("export=%ff", Wanted(export="\udcff")),
    ],
)
def test_what_is_asked_for(query: str, wanted: Wanted) -> None:
    assert parse_wanted(query) == wanted


@pytest.mark.parametrize(
    "query", ["map=0", "map=16385", "map=-1", "map=1e3", "map=%D9%A3", "map=99999999999", "size=1"]
)
def test_what_cannot_be_told_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match=r"map has to be a number from 1 to 16384|there is no 'size' to be asked for"):
        parse_wanted(query)


def test_a_map_is_rounded_but_only_nothing_is_0_and_everything_1() -> None:
    assert rounded([0.0, 1e-9, 0.33333, 0.9991, 1.0]) == [0, 0.001, 0.333, 0.999, 1]

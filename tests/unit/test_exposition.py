"""Metrics as text, read by the parsers of Prometheus' own client and by promtool."""

from __future__ import annotations

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from scraping import check_by_promtool

from xnbd.metrics.exposition import Family, Histogram, openmetrics, plain

ODD = 'Back\\slash, "quote"\nand line.'
FAMILIES = [
    Family("t_build", "info", "What it is.", [((("version", "1"),), 1)]),
    Family("t_requests", "counter", ODD, [((("export", "a"),), 3), ((("export", "b"),), 0)]),
    Family("t_age_seconds", "gauge", "How old.", [((), 1.5)], "seconds"),
    Family("t_took_seconds", "histogram", "How.", [((("c", "x"),), Histogram((0.1, 1.0), (1, 2, 3), 9.5))], "seconds"),
]


@pytest.mark.parametrize(("make", "parse"), [(openmetrics, parse_openmetrics), (plain, parse_plain)])
def test_both_formats_are_understood(make, parse) -> None:  # type: ignore[no-untyped-def]
    families = {family.name.removesuffix("_info"): family for family in parse(make(FAMILIES).decode())}
    assert set(families) == {"t_build", "t_requests", "t_age_seconds", "t_took_seconds"}
    assert [sample.value for sample in families["t_requests"].samples] == [3, 0]
    assert families["t_age_seconds"].samples[0].value == 1.5
    took = {(s.name, s.labels.get("le")): s.value for s in families["t_took_seconds"].samples}
    assert took == {
        ("t_took_seconds_bucket", "0.1"): 1,
        ("t_took_seconds_bucket", "1.0"): 3,
        ("t_took_seconds_bucket", "+Inf"): 6,
        ("t_took_seconds_count", None): 6,
        ("t_took_seconds_sum", None): 9.5,
    }


@pytest.mark.parametrize(("make", "parse"), [(openmetrics, parse_openmetrics), (plain, parse_plain)])
@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\\nb", 'x",y="z', "ä{}", "", "\\"])
def test_names_of_exports_come_back_as_they_were(make, parse, name: str) -> None:  # type: ignore[no-untyped-def]
    text = make([Family("t_size_bytes", "gauge", "Size.", [((("export", name),), 1)], "bytes")]).decode()
    (family,) = parse(text)
    assert [sample.labels for sample in family.samples] == [{"export": name}]


def test_what_is_no_utf8_stays_legible() -> None:
    text = plain([Family("t_size_bytes", "gauge", "Size.", [((("export", "a\udcff"),), 1)])])
    assert b'export="a\\udcff"' in text or b'export="a\\\\udcff"' in text
    text.decode()


def test_promtool_finds_nothing_wrong() -> None:
    assert check_by_promtool(plain(FAMILIES[2:])) == ""

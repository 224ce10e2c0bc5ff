"""Which copy of a bitmap counts, over all that may be known of the files: less is believed, never more."""

from __future__ import annotations

from itertools import product
from typing import Iterator, List, Tuple

import pytest

from xnbd.proxy.state.verdict import Facts, Trust, Verdict, judge, trust_in_marks

ASSURING = ["lived", "alike", "explained", "live_fits", "durable_fits", "adopt"]


def possible(facts: Facts) -> bool:
    """Copies that are alike have one checksum, and others not the same; version 1 has none, and no file in use."""
    if facts.alike and (not facts.explained or facts.live_fits != facts.durable_fits):
        return False
    if not facts.alike and facts.live_fits and facts.durable_fits:
        return False
    return facts.checksum or not (facts.live_fits or facts.durable_fits)


def all_facts() -> Iterator[Facts]:
    return filter(possible, (Facts(*values) for values in product((False, True), repeat=len(Facts._fields))))


def rows() -> List[List[str]]:
    """The table in the docstring, without its frame."""
    lines = [line.strip() for line in (judge.__doc__ or "").splitlines()]
    first, second, third = (n for n, line in enumerate(lines) if line.startswith("==="))
    edges = [len(part) for part in lines[first].split("  ")]
    table = []
    for line in lines[second + 1 : third]:
        cells, at = [], 0
        for width in edges:
            cells.append(line[at : at + width].strip())
            at += width + 2
        table.append(cells)
    return table


def fits(facts: Facts, made: str, use: str, failed: str, copies: str) -> bool:
    """Whether a row of the table speaks of these facts."""
    return (
        (made == "yes") == facts.made
        and failed in ("any", "yes" if facts.failed else "no")
        and {
            "any": True,
            "closed": facts.clean and facts.checksum,
            "closed, no sum": facts.clean and not facts.checksum,
            "used elsewhere": not facts.clean and not facts.lived,
            "used here": not facts.clean and facts.lived,
        }[use]
        and {
            "any": True,
            "both fit": (facts.live_fits and facts.durable_fits) or (facts.alike and facts.durable_fits),
            "the durable one fits": facts.durable_fits,
            "the live one fits": facts.live_fits,
            "it does not fit": not facts.durable_fits,
            "none fits": not facts.live_fits and not facts.durable_fits,
            "alike": facts.alike,
            "different": not facts.alike,
            "alike, or explained": facts.explained,
            "not explained": not facts.explained,
        }[copies]
    )


def test_the_table_says_what_is_done_and_has_a_row_for_everything() -> None:
    used = set()
    for facts in all_facts():
        number, row = next((n, row) for n, row in enumerate(rows()) if fits(facts, *row[:4]))
        assert judge(facts).name == row[4 + facts.adopt], (facts, row)
        used.add(number)
    assert used == set(range(len(rows())))


@pytest.mark.parametrize("field", ASSURING)
def test_less_assurance_never_has_the_live_bitmap_believed(field: str) -> None:
    for facts in all_facts():
        less = facts._replace(**{field: False})
        if getattr(facts, field) and possible(less) and judge(less) is Verdict.LIVE:
            assert judge(facts) is Verdict.LIVE, facts


def test_a_failed_write_back_never_has_a_bitmap_believed_that_was_refused() -> None:
    """In use the durable copy may be taken without the live one, which explains nothing then."""
    for facts in all_facts():
        if not facts.failed and facts.clean and judge(facts) is Verdict.REFUSE:
            assert judge(facts._replace(failed=True)) is Verdict.REFUSE


def test_the_live_bitmap_never_counts_after_a_failed_write_back_or_another_life() -> None:
    for facts in all_facts():
        if facts.failed or not (facts.clean or facts.lived):
            assert judge(facts) is not Verdict.LIVE


def test_nobody_but_the_operator_has_copies_believed_that_contradict_what_was_noted() -> None:
    for facts in all_facts():
        if judge(facts) is Verdict.LIVE and not facts.adopt:
            assert facts.live_fits or (facts.alike and not (facts.clean and facts.checksum)) or not facts.clean
            assert facts.clean or facts.explained


def test_what_is_not_known_is_the_worst() -> None:
    assert judge(Facts(made=False)) is Verdict.MAKE
    assert judge(Facts(made=True)) is Verdict.DURABLE
    assert judge(Facts(made=True, clean=True)) is Verdict.REFUSE


# The written map


TOLD_AND_SWITCHED = list(product((False, True), repeat=2))
LESS_TRUST = [Trust.MAP, Trust.UNEXPOSED, Trust.NOTHING]


def settled() -> Iterator[Tuple[Facts, Verdict]]:
    """What may be known of files that are gone on with, and which copy of the bitmap counts."""
    for facts in all_facts():
        verdict = judge(facts)
        if verdict in (Verdict.LIVE, Verdict.DURABLE):
            yield facts, verdict


def test_the_written_map_is_believed_as_its_table_says() -> None:
    for (facts, verdict), (told, switched) in product(settled(), TOLD_AND_SWITCHED):
        wanted = Trust.NOTHING
        if told and not switched and not facts.adopt and not facts.failed:
            wanted = Trust.MAP if facts.clean or facts.lived else Trust.UNEXPOSED
        assert trust_in_marks(verdict, facts, told=told, switched=switched) is wanted


@pytest.mark.parametrize("field", ["clean", "lived", "failed", "adopt"])
def test_less_assurance_never_has_more_of_the_written_map_believed(field: str) -> None:
    for (facts, verdict), (told, switched) in product(settled(), TOLD_AND_SWITCHED):
        less = facts._replace(**{field: field in ("failed", "adopt")})
        if not possible(less) or judge(less) is not verdict:
            continue
        before = trust_in_marks(verdict, facts, told=told, switched=switched)
        assert LESS_TRUST.index(trust_in_marks(verdict, less, told=told, switched=switched)) >= LESS_TRUST.index(before)


def test_what_is_not_known_of_marks_is_the_worst() -> None:
    assert trust_in_marks(Verdict.DURABLE, Facts(made=True), told=False, switched=False) is Trust.NOTHING
    assert trust_in_marks(Verdict.DURABLE, Facts(made=True), told=True, switched=False) is Trust.NOTHING
    assert trust_in_marks(Verdict.DURABLE, Facts(made=True, failed=False), told=True, switched=False) is Trust.UNEXPOSED

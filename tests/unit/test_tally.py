"""The tally: lines that belong to an export, and sums that never get less."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Iterator

import pytest
from server_process import ROOT

from xnbd.scoreboard.counters import BYTES_READ, new_counts
from xnbd.scoreboard.tally import (
    BOUNDS,
    COMMANDS,
    ERRORS,
    PLACES,
    ROWS,
    Sums,
    Tally,
    TallyReader,
    create_tally,
    durations_by_command,
    is_same_tally,
)
from xnbd.system.forking import fork


@pytest.fixture
def fd() -> Iterator[int]:
    fd = create_tally(64)
    yield fd
    os.close(fd)


def read(fd: int, export: str = "disk") -> Sums:
    return TallyReader([fd]).read()[export]


def test_lines_of_one_export_are_summed_and_those_of_others_kept_apart(fd: int) -> None:
    for export, number in (("disk", 1), ("disk", 2), ("other", 4)):
        Tally(fd, export).answered(number, 0, 1e-3)
    sums = TallyReader([fd]).read()
    assert {name: sum(export.durations(0)[0]) for name, export in sums.items()} == {"disk": 3, "other": 4}


def test_a_duration_counts_in_the_first_bucket_that_it_does_not_exceed(fd: int) -> None:
    tally = Tally(fd, "disk")
    for seconds in (BOUNDS[0], BOUNDS[3], BOUNDS[3] * 1.01, 1000.0):
        tally.answered(1, 0, seconds)
    buckets, total = read(fd).durations(COMMANDS.index("READ"))
    assert [number for number, count in enumerate(buckets) if count] == [0, 3, 4, len(BOUNDS)]
    assert total == pytest.approx(1000.0, rel=1e-3)


def test_reads_and_writes_of_a_batch_count_for_their_commands(fd: int) -> None:
    tally = Tally(fd, "disk")
    tally.answered(3, 2, 1e-3)
    tally.answered_some(COMMANDS.index("FLUSH"), 1, 0.5, waited=False)
    tally.answered_some(99, 1, 0.5, waited=True)
    sums = read(fd)
    counts = {name: sum(sums.durations(place)[0]) for place, name in enumerate(COMMANDS)}
    assert {name: count for name, count in counts.items() if count} == {"READ": 3, "WRITE": 2, "FLUSH": 1, "other": 1}
    assert sums.hits == 6


def test_an_error_that_the_protocol_does_not_have_counts_as_eio(fd: int) -> None:
    tally = Tally(fd, "disk")
    for number in (28, 28, 5, 77):
        tally.refused(COMMANDS.index("WRITE"), number)
    assert dict(zip(ERRORS, read(fd).refusals(COMMANDS.index("WRITE")))) == {
        **dict.fromkeys(ERRORS, 0),
        "ENOSPC": 2,
        "EIO": 2,
    }


def test_the_next_process_in_a_line_goes_on_from_what_the_former_one_has_left(fd: int) -> None:
    first, counts = Tally(fd, "disk"), new_counts()
    counts[BYTES_READ] = 1000
    first.begin(counts)
    counts[BYTES_READ] += 512
    first.follow(counts)
    first.tell("clients", 1)
    assert (read(fd)["bytes_read"], read(fd)["clients"]) == (512, 1)
    first.close()
    assert (read(fd)["bytes_read"], read(fd)["clients"], read(fd).alive) == (512, 0, False)
    second = Tally(fd, "disk")
    assert (read(fd)["bytes_read"], read(fd)["clients"], read(fd).alive) == (512, 0, True)
    counts[BYTES_READ] = 8
    second.follow(counts)
    assert read(fd)["bytes_read"] == 520


def test_a_line_is_never_another_exports(fd: int) -> None:
    Tally(fd, "disk").close()
    other = Tally(fd, "other")
    other.answered(1, 0, 1.0)
    assert set(TallyReader([fd]).read()) == {"disk", "other"}
    assert sum(read(fd).durations(0)[0]) == 0


def test_a_killed_process_has_no_client_any_more_and_what_it_did_stays(fd: int) -> None:
    ready, tell = os.pipe()

    def live() -> int:
        tally = Tally(fd, "disk")
        tally.tell("clients", 1)
        tally.answered(7, 0, 1e-3)
        os.write(tell, b".")
        signal.pause()
        return 0

    pid = fork("a process that counts", live)
    os.read(ready, 1)
    assert read(fd)["clients"] == 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (read(fd)["clients"], sum(read(fd).durations(0)[0])) == (0, 7)


def test_there_is_an_end_to_the_lines() -> None:
    fd = create_tally(2)
    tallies = [Tally(fd, "disk") for _ in range(2)]
    with pytest.raises(OSError, match="more processes"):
        Tally(fd, "disk")
    tallies[0].close()
    Tally(fd, "disk").close()
    with pytest.raises(OSError, match="more processes"):
        Tally(fd, "other")
    os.close(fd)


def test_names_of_every_kind(fd: int) -> None:
    for name in ("", "a\nb", "ä" * 2000, "\udcff"):
        Tally(fd, name).answered(1, 0, 1.0)
    assert set(TallyReader([fd]).read()) == {"", "a\nb", "ä" * 2000, "\udcff"}


def test_a_program_that_has_other_rows_reads_those_that_it_knows(fd: int) -> None:
    former = create_tally(4)
    Tally(former, "disk").answered(5, 0, 1e-3)
    head = os.pread(former, 4096, 0)
    os.pwrite(former, head.replace(b'"misses"', b'"mishes"'), 0)
    Tally(fd, "disk").answered(2, 0, 1e-3)
    assert is_same_tally(fd)
    assert not is_same_tally(former)
    sums = TallyReader([fd, former]).read()["disk"]
    assert sum(sums.durations(0)[0]) == 7
    os.close(former)


def test_what_is_no_tally_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(OSError, match="no tally"):
        TallyReader([fd])
    os.close(fd)


def test_every_row_says_what_it_means() -> None:
    assert all(row.meaning for row in ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_documents_have_the_rows() -> None:
    rows = [(str(8 * PLACES[row.name]), row.name, str(row.places), row.meaning) for row in ROWS]
    text = re.sub(r" +", " ", (ROOT / "contrib/doc/protocols.rst").read_text())
    assert [row for row in rows if "\n" + " ".join(row) + "\n" not in text] == []


def test_durations_of_several_exports_are_added_up() -> None:
    fd = create_tally(2)
    for export in ("one", "two"):
        tally = Tally(fd, export)
        tally.answered(2, 1, 3e-5)
        tally.answered(1, 0, 60.0)
        tally.close()
    told = durations_by_command(TallyReader([fd]).read().values())
    assert told["bounds"] == list(BOUNDS)
    assert (told["read"][2], told["read"][-1], sum(told["read"])) == (4, 2, 6)
    assert (sum(told["write"]), "flush" in told) == (2, False)
    assert durations_by_command([Sums()]) == {"bounds": list(BOUNDS)}

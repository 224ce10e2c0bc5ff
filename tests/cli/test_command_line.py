"""Command lines: help, version, and what makes no sense, which is one line and exit status 2."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import List

import pytest
from conftest import Start
from launch import fails, serving
from server_process import command, run

USAGE_ERROR = 2


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_usage_and_every_option(option: str) -> None:
    _, text, err = run(*command(option))
    assert err == ""
    assert "Usage:" in text
    for name in ("--target", "--lport", "--unix", "--create", "--readonly", "--daemonize", "--spin", "--connected-fd"):
        assert name in text


def test_version() -> None:
    _, text, err = run(*command("--version"))
    assert (text.startswith("xnbd-server "), err) == (True, "")


def test_program_runs_by_its_name_alone_from_any_directory(tmp_path: Path) -> None:
    link = tmp_path / "xnbd-server"
    link.symlink_to(command()[-1])
    _, text, _ = run(command()[0], "-W", "error", link, "--version")
    assert text.startswith("xnbd-server ")


@pytest.mark.parametrize(
    "option, values",
    [
        ("--lport", ["x", "-1", "65536", "80.5", "", "0x50"]),
        ("--max-clients", ["0", "-1", "many", "1e3"]),
        ("--spare-workers", ["0", "-1", "x"]),
        ("--handshake-timeout", ["0", "-1", "x", "nan", "inf"]),
        ("--spin", ["-1", "x", "1.5"]),
        ("--create", ["0", "-1", "x", "1Z", "1.5G", "G", "9E", "", "1 G x"]),
    ],
)
def test_bad_value_is_named(image: Path, option: str, values: List[str]) -> None:
    for value in values:
        status, message = fails("--target", option, value, image)
        assert status == USAGE_ERROR, (option, value)
        assert option in message


@pytest.mark.parametrize("option", ["--unix", "--pidfile", "--logpath", "--exportname", "--connected-fd"])
def test_empty_value_is_refused(image: Path, option: str) -> None:
    """A script's unset variable must not silently mean something else."""
    status, message = fails("--target", option, "", image)
    assert status == USAGE_ERROR
    assert option in message


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--target"],
        ["disk.img"],
        ["--target", "one.img", "two.img"],
        ["--target", "--no-such-option", "disk.img"],
        ["--target", "--lport"],
        ["--target", "--lport", "1", "--lport", "2", "disk.img"],
        ["--target", "--cow-target", "disk.img"],
        ["--target=yes", "disk.img"],
        ["--target", "--inetd", "--connected-fd", "3", "disk.img"],
        ["--target", "--inetd", "--daemonize", "disk.img"],
        ["--target", "--inetd", "--lport", "8520", "disk.img"],
        ["--target", "--inetd", "--unix", "sock", "disk.img"],
        ["--target", "--connected-fd", "3", "--daemonize", "disk.img"],
        ["--target", "--connected-fd", "3", "--laddr", "::1", "disk.img"],
        ["--target", "--connected-fd", "x", "disk.img"],
        ["--target", "--connected-fd", "-1", "disk.img"],
        ["--target", "--verbose", "--quiet", "disk.img"],
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: List[str]) -> None:
    assert fails(*arguments)[0] == USAGE_ERROR


def test_bytes_that_are_no_text_are_no_traceback(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.img")
    status, message = fails("--target", "--lport", "0", name)
    assert status == 1
    assert "No such file" in message


def test_abbreviations_work_where_they_are_clear(start: Start, image: Path) -> None:
    start("--target", "--handshake", "5", image).wait_for_log("serving")


def test_help_that_is_not_read_to_its_end_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command("--help"), stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_cannot_be_written_is_one_line(option: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command(option), stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"xnbd-server: cannot write to standard output: No space left on device\n"


def test_wrong_command_line_without_standard_output_is_one_line() -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command("--target")], stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr.count(b"\n")) == (USAGE_ERROR, 1)


@pytest.mark.parametrize("program", ["xnbd-server", "xnbd-bgctl", "xnbd-wrapper", "xnbd-wrapper-ctl"])
def test_missing_module_is_one_line_that_says_how_to_get_it(program: str) -> None:
    path = Path(command()[-1]).with_name(program)
    status, out, err = run(command()[0], "-S", "-W", "error", path, "--help", check=False)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "lacks the module docopt: contrib/setup makes" in err


def test_quiet_logs_no_ordinary_events(start: Start, image: Path) -> None:
    server = start("--target", "--quiet", image)
    server.connect().close()
    server.stop()
    assert server.log() == ""


def test_verbose_logs_no_less(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path / "log", "--target", "--verbose", "--unix", tmp_path / "sock", image) as server:
        assert f"serving disk image disk.img, {image.stat().st_size} bytes" in server.log()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target"], "expected xnbd-server --target [--laddr ADDRESS]... [options] DISK_IMAGE ("),
        (["--cow-t", "a", "b"], "expected xnbd-server --cow-target [--laddr ADDRESS]... [options] BASE_DISK_IMAGE ("),
        (["--proxy", "host", "8520"], "CACHE_DISK_IMAGE CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH ("),
        (["disk.img"], "expected one of --target, --cow-target, --proxy ("),
    ],
)
def test_what_was_expected_is_said(arguments: List[str], expected: str) -> None:
    assert expected in fails(*arguments)[1]


@pytest.mark.parametrize(
    ("option", "other"), [("--pidfile", "--logpath"), ("--pidfile", "DISK_IMAGE"), ("--logpath", "DISK_IMAGE")]
)
def test_one_file_for_two_things_is_refused(image: Path, option: str, other: str) -> None:
    """A pid file or a log in the image's place would destroy it."""
    before = image.read_bytes()
    path = image.parent / "both" if other == "--logpath" else image
    arguments = ["--logpath", path] if other == "--logpath" else []
    status, message = fails("--target", "--lport", "0", option, path, *arguments, image)
    assert (status, image.read_bytes()) == (USAGE_ERROR, before)
    assert f"{path}: each needs its own" in message
    assert option in message and other in message


def test_cache_and_bitmap_in_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.img"
    status, message = fails("--proxy", "127.0.0.1", "8520", path, path, tmp_path / "control")
    assert (status, path.exists()) == (USAGE_ERROR, False)
    assert message.startswith("xnbd-server: CACHE_DISK_IMAGE and CACHE_BITMAP_IMAGE are the same file")


@pytest.mark.parametrize("program", ["xnbd-server", "xnbd-bgctl", "xnbd-wrapper", "xnbd-wrapper-ctl"])
def test_usage_fits_into_80_columns(program: str) -> None:
    lines = usage_of(program).splitlines()
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("program", ["xnbd-server", "xnbd-bgctl", "xnbd-wrapper", "xnbd-wrapper-ctl"])
def test_no_line_of_a_description_looks_like_an_option(program: str) -> None:
    """docopt would take it for one, and accept what nobody looks at."""
    assert not re.findall(r"(?m)^ {20,}-.*", usage_of(program).partition("\n\n")[2].partition("\n\n")[2])


def usage_of(program: str) -> str:
    return run(command()[0], Path(command()[-1]).with_name(program), "--help")[1]

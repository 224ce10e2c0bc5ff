"""Options as the programs have them: what a command line becomes, and what the wrapper makes without one."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
from pathlib import Path
from typing import Iterator, List, Optional

import pytest
from launch import fails
from server_process import command

from xnbd.cli import server
from xnbd.cli.inside import OwnServer
from xnbd.cli.options import Introduced, LogOptions, OneClient, ServerOptions
from xnbd.cli.server_options import server_options
from xnbd.cli.values import parse_command_line
from xnbd.errors import ConfigurationError
from xnbd.protocol.server_handshake import Agreement, Export
from xnbd.server.process_loop import ProcessLoop
from xnbd.server.session.connection import Connection
from xnbd.server.session.parking import QueueLimits
from xnbd.system.user import User
from xnbd.wrapper.exports import ProxyExport, StoredExport, TargetExport
from xnbd.wrapper.servers import OWN_OPTIONS, ForeignServer

PROXY = ProxyExport("/cache", "/bitmap", "/p.ctl", "origin", "8520", "there")


def parsed(words: List[str]) -> ServerOptions:
    def begin(log: LogOptions, file_mode: Optional[int], user: Optional[User]) -> None:
        pass

    return server_options(parse_command_line(server.PROGRAM, server.__doc__ or "", words, ""), begin)


@pytest.fixture
def nobody() -> Iterator[Connection]:
    with socket.socket() as sock:
        yield Connection(sock, ProcessLoop(handle_signals=False))


@pytest.mark.parametrize(
    "export",
    [
        TargetExport("/images/../disk"),
        PROXY,
        PROXY._replace(remote_export_name=""),
        PROXY._replace(remote_host="", remote_port="", remote_export_name="", remote_uri="nbd+unix:///x?socket=/s"),
    ],
)
def test_a_server_in_the_wrapper_has_the_options_of_one_with_a_command_line(
    export: StoredExport, nobody: Connection
) -> None:
    agreements = [
        Agreement(),
        Agreement(Export("e", 1, 1, "d"), True),
        Agreement(None, True, ("base:allocation", "xnbd:written")),
    ]
    choices = itertools.product((False, True), (False, True), (False, True), agreements)
    for cow, readonly, syslog, agreement in choices:
        foreign = ForeignServer(["x"], OWN_OPTIONS, cow, readonly, syslog, None, "9", "8K")
        words = ["--logpath", "/log", *foreign.arguments(export, 7, agreement)]
        own = OwnServer(cow, readonly, LogOptions("/log", syslog), QueueLimits(9, 8192))
        agreed = agreement._replace(export=None, ordered=False)
        alone, inside = parsed(words), own.options(export, Introduced(nobody, agreed))
        assert (alone.clients, inside.clients) == (OneClient(7, agreed), Introduced(nobody, agreed))
        assert alone._replace(clients=inside.clients) == inside


def test_options_do_not_change() -> None:
    options = parsed(["--target", "/disk"])
    with pytest.raises(AttributeError):
        options.spin = 0.0  # type: ignore[misc]


def test_a_server_in_the_wrapper_refuses_files_with_two_uses(tmp_path: Path, nobody: Connection) -> None:
    cache = tmp_path / "cache"
    cache.touch()
    (tmp_path / "link").symlink_to(cache)
    export = PROXY._replace(image_path=str(cache), bitmap_path=str(tmp_path / "link"))
    with pytest.raises(ConfigurationError, match="CACHE_DISK_IMAGE and CACHE_BITMAP_IMAGE are the same file"):
        OwnServer().options(export, Introduced(nobody, Agreement()))


@pytest.mark.parametrize("option", ["--max-clients", "--spare-workers", "--lport"])
def test_what_only_matters_with_many_clients_is_not_looked_at_for_one(option: str) -> None:
    words = ["--target", "--connected-fd", "7", option, "x", "/disk"]
    if option == "--lport":
        with pytest.raises(ConfigurationError, match="do not go together"):
            parsed(words)
    else:
        assert parsed(words).clients == OneClient(7, Agreement())


@pytest.mark.parametrize("option", ["--spin", "--max-clients", "--lport", "--create", "--handshake-timeout"])
def test_a_bad_value_is_in_the_log_too(image: Path, option: str) -> None:
    log = image.parent / "log"
    status, message = fails("--target", "--logpath", log, option, "x", image)
    assert status == 2
    assert message.partition(": ")[2].strip() in log.read_text()


@pytest.mark.parametrize("option", ["--lport", "--spin", "--max-clients", "--spare-workers"])
def test_a_bad_value_is_found_before_anything_is_made(tmp_path: Path, option: str) -> None:
    assert fails("--target", "--create", "1M", option, "x", tmp_path / "disk")[0] == 2
    assert not list(tmp_path.iterdir())


def test_a_file_with_two_uses_is_not_written_to(image: Path) -> None:
    before = image.read_bytes()
    status, message = fails("--target", "--logpath", image, "--spin", "x", image)
    assert (status, image.read_bytes()) == (2, before)
    assert "are the same file" in message


@pytest.mark.parametrize("words", [["--target", "DISK"], ["--proxy", "127.0.0.1", "1", "CACHE", "BITMAP", "CONTROL"]])
def test_the_start_is_spared_modules_that_take_long_to_import(tmp_path: Path, words: List[str]) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    ended = subprocess.run(command(*words), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    modules = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "xnbd.cli.serving" in modules
    assert not modules & {"dataclasses", "inspect", "ctypes"}

"""xnbd-wrapper --user: the wrapper and the servers of its clients are another user's than root's."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Iterator

import pytest
from conftest import MIB, Start
from launch import launched
from server_process import children_of, run, wait_until
from wrapper_process import Wrapper, fails, program

pytestmark = pytest.mark.root(reason="only root has rights to give up")

UID, GID = 47111, 47121
USER = f"{UID}:{GID}"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the user's."""
    path = Path(tempfile.mkdtemp(prefix="xnbd-user-"))
    os.chown(path, UID, GID)
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def disk(path: Path) -> Path:
    path.write_bytes(path.name.encode() * (MIB // len(path.name)))
    path.chmod(0o600)
    os.chown(path, UID, GID)
    return path


def is_the_users(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    assert re.findall(r"^(?:Uid|Gid):\s*(.*)", status, re.MULTILINE) == [
        "\t".join([str(number)] * 4) for number in (UID, GID)
    ]
    assert set(re.findall(r"^Cap(?:Inh|Prm|Eff|Amb):\s*(\w+)", status, re.MULTILINE)) == {"0" * 16}
    assert re.findall(r"^Groups:\s*(.*?)\s*$", status, re.MULTILINE) == [str(GID)]
    return "NoNewPrivs:\t1" in status


@pytest.fixture
def wrapper(place: Path) -> Iterator[Wrapper]:
    one = Wrapper(place, ["--user", USER, "--imgfile", disk(place / "one.img"), "--imgfile", disk(place / "two.img")])
    try:
        one.wait_until_ready()
        yield one
    finally:
        one.stop()
    assert " ERROR: " not in one.log(), one.log()
    assert "Traceback" not in one.log()


def test_all_processes_are_the_users_and_so_are_the_files(wrapper: Wrapper, place: Path) -> None:
    with wrapper.client("one.img") as client, wrapper.client("two.img") as other:
        assert client.write(0, b"new") == 0
        assert (client.read(0, 3), other.read(0, 3)) == (b"new", b"two")
        assert all(map(is_the_users, [wrapper.process.pid, *wrapper.servers()]))
        assert len(wrapper.servers()) == 2
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in (wrapper.database, wrapper.control)} == {(UID, GID)}
    assert "--user" not in wrapper.log()


def test_exports_come_and_go(wrapper: Wrapper, place: Path) -> None:
    wrapper.ctl("--add-target", "three", disk(place / "three.img"))
    with wrapper.client("three") as client:
        assert client.read(0, 5) == b"three"
    wrapper.ctl("--remove-by-exportname", "three")
    assert set(wrapper.stored()) == {"one.img", "two.img"}
    os.chown(place / "three.img", 0, 0)
    assert "Permission denied" in wrapper.refuses("--add-target", "three", place / "three.img")


def test_proxies_are_served_and_steered(wrapper: Wrapper, place: Path, start: Start, image: Path) -> None:
    origin = start("--target", "--readonly", image, tcp=True)
    files = [place / f"cache{suffix}" for suffix in (".img", ".bitmap", ".ctl")]
    wrapper.ctl("--add-proxy", "far", "127.0.0.1", origin.port, *files)
    with wrapper.client("far") as client:
        assert client.read(0, 4096) == image.read_bytes()[:4096]
        (server,) = wrapper.servers()
        assert all(map(is_the_users, [server, *children_of(server)]))
    wrapper.ctl("--bgctl-cache-all", "far")
    wrapper.ctl("--bgctl-switch", "far")
    assert wrapper.listed()["far"]["mode"] == "target"
    assert {path.lstat().st_uid for path in place.glob("cache*")} == {UID}


def test_a_server_of_the_users_choice_has_no_other_rights(place: Path) -> None:
    command = " ".join(program("xnbd-server"))
    one = Wrapper(place, ["--user", USER, "--xnbd-server", command, "--imgfile", disk(place / "one.img")])
    try:
        one.wait_until_ready()
        with one.client("one.img") as client:
            assert client.read(0, 3) == b"one"
            wait_until(lambda: len(one.servers()) == 1, "the server")
            assert all(map(is_the_users, one.servers()))
    finally:
        one.stop()


def test_what_the_user_cannot_use_is_told_at_the_start(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o755)
    image = disk(place / "one.img")
    os.chown(image, 0, 0)
    words = [
        *program("xnbd-wrapper"),
        *("--user", USER, "--unix", place / "s", "--socket", closed / "ctl"),
        *("--dbpath", place / "db", "--imgfile", image),
    ]
    with launched(words, place / "log") as wrapper:
        wrapper.wait_for_log("INFO: serving")
        told = re.findall("WARNING: (.*)", wrapper.log())
        assert told == [
            f"--user {UID}: that user cannot make or remove files in {closed}: the socket stays there at the end",
            f"--user {UID}: that user cannot write to {image}: the export 'one.img' is not served",
        ]
    assert (closed / "ctl").is_socket()
    with launched([*words, "--readonly"], place / "log"):
        pass


def test_a_database_that_could_not_be_changed_is_refused(tmp_path: Path) -> None:
    status, message = fails(tmp_path, "--user", USER, "--dbpath", tmp_path / "db")
    expected = f"xnbd-wrapper: --user {UID}: that user cannot make or remove files in {tmp_path}: the exports could"
    assert (status, message.startswith(expected)) == (1, True)


def test_a_directory_that_is_made_for_the_database_is_the_users(place: Path) -> None:
    words = [*program("xnbd-wrapper"), "--user", USER, "--unix", place / "s", "--socket", place / "ctl"]
    with launched([*words, "--dbpath", place / "new" / "db"], place / "log") as wrapper:
        wrapper.wait_for_log("INFO: serving")
        assert (place / "new").stat().st_uid == UID
    assert run("stat", "-c", "%u", place / "new" / "db")[1] == f"{UID}\n"

"""xnbd-wrapper-ctl against a running wrapper: exports come and go, the wrapper ends in several ways."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import threading
from pathlib import Path
from typing import List, Set

import pytest
from conftest import MIB, StartWrapper
from control_loop import ControlLoop
from rawclient import ACK, ERR_UNKNOWN
from server_process import free_port, is_alive, run, wait_until
from wrapper_process import Wrapper, fails, program, wait_for_end


@pytest.fixture
def wrapper(start_wrapper: StartWrapper, image: Path) -> Wrapper:
    """A wrapper with the export disk.img, on a port that nobody else is given while there is no wrapper."""
    return start_wrapper("--imgfile", image, port=free_port())


# Adding and removing


def test_added_exports_are_served_and_stored(wrapper: Wrapper, image: Path) -> None:
    assert wrapper.ctl("--add-target", "second", image) == ""
    assert wrapper.stored()["second"] == {"mode": "target", "image_path": str(image)}
    with wrapper.client("second") as client:
        assert client.read(0, 100) == image.read_bytes()[:100]


def test_relative_paths_are_those_of_the_operator(
    wrapper: Wrapper, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parent)
    wrapper.ctl("--add-target", "relative", image.name)
    assert wrapper.stored()["relative"]["image_path"] == str(image)


def test_a_relative_socket_of_an_origin_is_the_operators(wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    words = ["--target-exportname", "x", "--add-proxy", "near", "nbd+unix:///?socket=s", "/n/1", "/n/2", "/n/3"]
    wrapper.ctl(*words)
    assert wrapper.stored()["near"]["remote_uri"] == "nbd+unix:///x?socket=/usr/s"


def test_a_uri_for_tcp_is_stored_as_host_and_port(wrapper: Wrapper) -> None:
    wrapper.ctl("--add-proxy", "far", "nbd://[::1]/their%20name", "/c/1", "/c/2", "/c/3")
    stored = wrapper.stored()["far"]
    remote = {key: value for key, value in stored.items() if key.startswith("remote_")}
    assert remote == {"remote_host": "::1", "remote_port": "10809", "remote_export_name": "their name"}


@pytest.mark.parametrize("origin", ["host", "nbds://me@host", "nbd+unix:///x", "nbd://host:x"])
def test_what_is_no_uri_of_an_origin_is_refused(wrapper: Wrapper, origin: str) -> None:
    command = [*program("xnbd-wrapper-ctl"), "--socket", wrapper.control]
    for words in (["--add-proxy", "far", origin, "/c/1", "/c/2", "/c/3"], ["--bgctl-reconnect", "far", origin]):
        status, out, err = run(*command, *words, check=False)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"xnbd-wrapper-ctl: origin {origin}: ")


def test_what_is_no_disk_is_not_added(wrapper: Wrapper, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "directory", "empty", "fifo"):
        assert str(tmp_path / name) in wrapper.refuses("--add-target", "x", tmp_path / name)
    assert set(wrapper.stored()) == {"disk.img"}


def test_names_are_given_once(wrapper: Wrapper, image: Path) -> None:
    assert "already" in wrapper.refuses("--add-target", "disk.img", image)


def test_names_that_nobody_could_ask_for_are_refused(wrapper: Wrapper, image: Path) -> None:
    assert "UTF-8" in wrapper.refuses("--add-target", "\udcff", image)
    assert "4096" in wrapper.refuses("--add-target", "x" * 4097, image)


def test_a_removed_export_keeps_its_clients_and_gets_no_more(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client, wrapper.connect() as late:
        late.greet()
        assert wrapper.ctl("--remove-by-exportname", "disk.img") == "removed disk.img\n"
        assert late.go("disk.img")[-1][0] == ERR_UNKNOWN, "it was connected before, but had not chosen"
        assert client.write(0, b"still there") == 0
        assert client.read(0, 11) == b"still there"
    assert wrapper.stored() == wrapper.listed() == {}


def test_an_export_that_comes_during_the_handshake_can_be_chosen(wrapper: Wrapper, image: Path) -> None:
    with wrapper.connect() as client:
        client.greet()
        assert client.go("new")[-1][0] == ERR_UNKNOWN
        wrapper.ctl("--add-target", "new", image)
        assert client.go("new")[-1][0] == ACK
        assert client.works()


def test_remove_by_file_takes_all_names_of_the_file(wrapper: Wrapper, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x" * MIB)
    wrapper.ctl("--add-target", "second", image)
    wrapper.ctl("--add-target", "other", other)
    assert wrapper.ctl("--remove-by-file", image) == "removed disk.img\nremoved second\n"
    assert set(wrapper.stored()) == {"other"}


def test_what_is_not_there_cannot_be_removed(wrapper: Wrapper, tmp_path: Path) -> None:
    assert "no export 'nothing'" in wrapper.refuses("--remove-by-exportname", "nothing")
    assert "no export of" in wrapper.refuses("--remove-by-file", tmp_path / "nothing")


# What the C xNBD's xnbd-wrapper-ctl takes


def test_add_names_an_export_as_its_file_is_written(wrapper: Wrapper, image: Path, tmp_path: Path) -> None:
    command = [*program("xnbd-wrapper-ctl"), "-s", wrapper.control]
    run(*command, "--add", image)
    run("env", "-C", tmp_path, *command, "-a", "./disk.img")
    assert wrapper.stored().keys() == {"disk.img", str(image), "./disk.img"}
    assert {entry["image_path"] for entry in wrapper.stored().values()} == {str(image)}
    with wrapper.client(str(image)) as client:
        assert client.works()


def test_remove_takes_the_index_that_the_list_shows(wrapper: Wrapper, image: Path) -> None:
    """An index stays what it was when others go, and is not given again: a script may remove one after the other."""
    for name in ("second", "third"):
        wrapper.ctl("--add-target", name, image)
    assert wrapper.ctl("--remove", 1) == "removed disk.img\n"
    assert "no export with the index 1" in wrapper.refuses("--remove", 1)
    assert wrapper.ctl("-r", 2) == "removed second\n"
    wrapper.ctl("--add-target", "disk.img", image)
    assert {name: about["index"] for name, about in wrapper.listed().items()} == {"third": 3, "disk.img": 4}


def test_letters_stand_for_list_and_shutdown(wrapper: Wrapper) -> None:
    command = [*program("xnbd-wrapper-ctl"), "-s", wrapper.control]
    assert run(*command, "-l")[1].splitlines()[1].split()[:2] == ["1", "disk.img"]
    run(*command, "-d")
    assert wrapper.process.wait(60) == 0


@pytest.mark.parametrize("words", [["--remove", "x"], ["-r", "0"], ["--remove"], ["--add"], ["-l", "-d"]])
def test_letters_do_not_make_sense_of_nonsense(wrapper: Wrapper, words: List[str]) -> None:
    command = [*program("xnbd-wrapper-ctl"), "-s", wrapper.control, *words]
    status, out, err = run(*command, check=False)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_exports_come_and_go_under_load(wrapper: Wrapper, image: Path, seed: int) -> None:
    content, failures, stop = image.read_bytes(), [], threading.Event()

    def use(number: int) -> None:
        chance = random.Random(seed + number)
        try:
            while not stop.is_set():
                with wrapper.connect() as client:
                    client.greet()
                    if client.go(f"export {chance.randrange(4)}")[-1][0] == ACK:
                        offset = chance.randrange(MIB)
                        assert client.read(offset, 3000) == content[offset:][:3000]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    with wrapper.client("disk.img") as bystander:
        for thread in threads:
            thread.start()
        chance = random.Random(seed)
        there: Set[str] = set()
        for _ in range(40):
            name = f"export {chance.randrange(4)}"
            command = {"command": "remove-by-exportname"} if name in there else {"command": "add-target"}
            assert "error" not in wrapper.ask(name=name, image_path=str(image), **command)[-1]
            there ^= {name}
            assert set(wrapper.stored()) == {"disk.img", *there}
        stop.set()
        for thread in threads:
            thread.join()
        assert bystander.works()
    assert not failures


# Seeing


def test_list_shows_a_table_with_clients(wrapper: Wrapper, image: Path) -> None:
    wrapper.ctl("--add-proxy", "far", "192.0.2.1", 8520, "/c/cache", "/c/bitmap", "/c/control")
    wrapper.ctl("--add-proxy", "near", "nbd+unix:///x%20y?socket=/n/s", "/n/cache", "/n/bitmap", "/n/control")
    with wrapper.client("disk.img"), wrapper.client("disk.img"):
        wait_until(lambda: wrapper.listed()["disk.img"]["clients"] == 2, "two clients")
        head, first, second, third = wrapper.ctl("--list").splitlines()
        assert head.split() == ["INDEX", "NAME", "MODE", "CLIENTS", "IMAGE", "ORIGIN"]
        assert first.split() == ["1", "disk.img", "target", "2", str(image)]
        assert second.split() == ["2", "far", "proxy", "0", "/c/cache", "192.0.2.1", "8520"]
        assert third.split() == ["3", "near", "proxy", "0", "/n/cache", "nbd+unix:///x%20y?socket=/n/s"]
    wait_until(lambda: wrapper.listed()["disk.img"]["clients"] == 0, "their leaving")


def test_list_as_json_is_complete(wrapper: Wrapper, image: Path) -> None:
    wrapper.ctl("--target-exportname", "their name", "--add-proxy", "far", "::1", 99, "/c/cache", "/c/bitmap", "/c/ctl")
    assert json.loads(wrapper.ctl("--list", "--json")) == [
        {"index": 1, "name": "disk.img", "mode": "target", "image_path": str(image), "clients": 0},
        {
            "index": 2,
            "name": "far",
            "mode": "proxy",
            "image_path": "/c/cache",
            "bitmap_path": "/c/bitmap",
            "control_socket_path": "/c/ctl",
            "remote_host": "::1",
            "remote_port": "99",
            "remote_export_name": "their name",
            "clients": 0,
        },
    ]


def test_a_thousand_exports_are_listed(wrapper: Wrapper, image: Path) -> None:
    wrapper.stop()
    images = {f"{number:0500}": {"mode": "target", "image_path": str(image)} for number in range(1000)}
    wrapper.database.write_text(json.dumps({"version": 2, "images": images}))
    again = Wrapper(wrapper.directory)
    try:
        again.wait_until_ready()
        assert len(again.listed()) == 1000
    finally:
        again.stop()


NONSENSE = [
    b"",
    b"{}",
    b"nonsense",
    b'{"command": "format-c"}',
    b'{"command": "add-target"}',
    b'{"command": ["list"]}',
    b'{"command": "add-target", "name": {}, "image_path": []}',
    b'{"command": "remove-by-file", "image_path": 5}',
    b'{"command": "bgctl-query", "name": []}',
    b'{"command": "remove-by-exportname", "name": {}}',
    b'{"command": "bgctl-reconnect", "name": "disk.img", "remote_port": 5}',
    b'{"command": "add-proxy", "name": "x", "remote_uri": ["nbd://h"]}',
    b'{"command": "add-proxy", "name": "x", "remote_uri": "nbd://h"}',
]


def test_nonsense_on_the_control_socket_is_answered_with_an_error(wrapper: Wrapper) -> None:
    for line in NONSENSE:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(str(wrapper.control))
            sock.sendall(line + b"\n")
            answer = json.loads(sock.makefile("rb").readline())
        assert answer["error"] != "internal error", line
    assert set(wrapper.listed()) == {"disk.img"}


def test_a_target_cannot_be_switched(wrapper: Wrapper) -> None:
    for option in ("--bgctl-query", "--bgctl-cache-all", "--bgctl-switch"):
        assert "is a target" in wrapper.refuses(option, "disk.img")
        assert "no export 'nothing'" in wrapper.refuses(option, "nothing")


# Staying


def test_control_socket_is_for_its_owner_only(wrapper: Wrapper) -> None:
    assert stat.S_IMODE(wrapper.control.stat().st_mode) == 0o600


def test_a_second_wrapper_is_refused_control_socket_and_database(wrapper: Wrapper, tmp_path: Path) -> None:
    status, message = fails(tmp_path, "--dbpath", tmp_path / "another.db")
    assert (status, str(wrapper.control) in message) == (1, True)
    (tmp_path / "elsewhere").mkdir()
    status, message = fails(tmp_path / "elsewhere", "--dbpath", wrapper.database)
    assert (status, "another wrapper uses it" in message) == (1, True)
    assert set(wrapper.listed()) == {"disk.img"}


def test_without_a_wrapper_there_is_one_line_of_complaint(tmp_path: Path) -> None:
    command = [*program("xnbd-wrapper-ctl"), "--socket", tmp_path / "nobody", "--list"]
    status, out, err = run(*command, check=False)
    assert (status, out, err.count("\n")) == (1, "", 1)


def test_an_answer_that_makes_no_sense_is_no_traceback(tmp_path: Path) -> None:
    loop = ControlLoop(tmp_path / "odd", {"list": lambda request: iter([{"export": {"name": "d"}}])})
    try:
        status, out, err = run(*program("xnbd-wrapper-ctl"), "--socket", tmp_path / "odd", "--list", check=False)
    finally:
        loop.stop()
    assert (status, out) == (1, "")
    assert err.startswith("xnbd-wrapper-ctl: the wrapper's answer makes no sense (KeyError('mode'))")


def test_save_writes_the_database_even_if_it_was_deleted(wrapper: Wrapper) -> None:
    wrapper.database.unlink()
    wrapper.ctl("--save")
    assert set(wrapper.stored()) == {"disk.img"}


def test_a_change_that_cannot_be_stored_is_not_made(wrapper: Wrapper, image: Path) -> None:
    blocker = Path(f"{wrapper.database}.new")
    blocker.mkdir()
    assert "cannot write database" in wrapper.refuses("--add-target", "second", image)
    assert set(wrapper.listed()) == {"disk.img"}
    blocker.rmdir()
    wrapper.ctl("--add-target", "second", image)


# Ending


def test_shutdown_ends_wrapper_and_servers(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client, wrapper.connect() as undecided:
        undecided.greet()
        assert client.write(0, b"kept") == 0
        wait_until(lambda: len(wrapper.servers()) == 2, "both processes")
        pids = wrapper.servers()
        wrapper.ctl("--shutdown")
        assert client.closed()
        assert undecided.closed()
        assert not any(map(is_alive, pids)), "the answer comes when all is over"
    assert wrapper.process.wait(60) == 0
    assert not wrapper.control.exists()
    assert set(wrapper.stored()) == {"disk.img"}


def test_after_shutdown_the_next_wrapper_can_start_at_once(wrapper: Wrapper, start_wrapper: StartWrapper) -> None:
    port = wrapper.port
    with wrapper.client("disk.img"):
        wrapper.ctl("--shutdown")
    with start_wrapper(port=port).client("disk.img") as client:
        assert client.works()


def test_orphaned_servers_live_as_long_as_their_clients(
    wrapper: Wrapper, start_wrapper: StartWrapper, image: Path
) -> None:
    port = wrapper.port
    with wrapper.client("disk.img") as old, wrapper.connect() as undecided:
        undecided.greet()
        wait_until(lambda: len(wrapper.servers()) == 2, "both processes")
        pids = wrapper.servers()
        wrapper.ctl("--orphan")
        assert wrapper.process.wait(60) == 0
        with start_wrapper(port=port).client("disk.img") as new:
            assert old.write(0, b"by the old") == 0
            assert new.read(0, 10) == b"by the old"
        assert undecided.go("disk.img")[-1][0] == ACK
        assert undecided.read(0, 10) == b"by the old"
        assert all(map(is_alive, pids))
    wait_for_end(pids)


def test_sigterm_is_a_shutdown(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client:
        pids: List[int] = wrapper.servers()
        assert wrapper.stop() == 0
        assert client.closed()
        wait_for_end(pids)


def test_shutdown_does_not_wait_for_a_stopped_server_for_ever(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client:
        assert client.works()
        (pid,) = wrapper.servers()
        os.kill(pid, signal.SIGSTOP)
        assert wrapper.stop() == 1
        assert not is_alive(pid)
    assert "still busy" in wrapper.log()

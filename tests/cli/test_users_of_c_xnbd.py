"""What users of the C xNBD 0.4.1 have in their scripts, units and files: it goes on to work."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from conftest import Start, StartWrapper
from launch import fails
from rawclient import ACK, ERR_UNKNOWN, EXPORT_NAME, INFO, REP_INFO, WRITE, RawClient, go_data, pack_option
from server_process import command, free_port, run, wait_until
from wrapper_process import Wrapper, program


def name_of(client: RawClient, name: str) -> str:
    """What the server calls the disk that the client asks for by *name*."""
    replies = client.option(INFO, go_data(name, 1))
    return next(data[2:].decode() for kind, data in replies if kind == REP_INFO and data[:2] == b"\0\1")


def size_of(client: RawClient, name: str) -> int:
    """The size of the disk *name*, chosen with EXPORT_NAME as the C xNBD's client does it."""
    client.send(pack_option(EXPORT_NAME, name.encode()))
    return int.from_bytes(client.receive(10)[:8], "big")


def chooses(wrapper: Wrapper, name: str) -> int:
    """How the wrapper answers a client that chooses *name*."""
    with wrapper.connect() as client:
        client.greet()
        return client.go(name)[-1][0]


# The wrapper's disks


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """An image of 512 bytes that is called disk.img too."""
    path = tmp_path / "other" / "disk.img"
    path.parent.mkdir()
    path.write_bytes(b"x" * 512)
    return path


def test_an_image_answers_to_its_path_and_is_listed_once(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image)
    assert set(wrapper.listed()) == {"disk.img"}
    with wrapper.connect() as client:
        client.greet()
        assert name_of(client, str(image)) == "disk.img"
        assert client.go(str(image))[-1][0] == ACK
        assert client.read(0, 100) == image.read_bytes()[:100]
        wait_until(lambda: wrapper.listed()["disk.img"]["clients"] == 1, "the client in the list")
    with wrapper.connect() as client:
        client.greet()
        assert size_of(client, str(image)) == image.stat().st_size


def test_a_path_is_an_alias_as_it_was_written(
    start_wrapper: StartWrapper, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parent)
    wrapper = start_wrapper("--imgfile", f"./{image.name}")
    assert chooses(wrapper, f"./{image.name}") == ACK
    assert chooses(wrapper, str(image)) == ERR_UNKNOWN


def test_images_of_one_file_name_are_told_apart_by_their_paths(
    start_wrapper: StartWrapper, image: Path, other: Path
) -> None:
    for order in ([image, image, other], [other, image]):
        wrapper = start_wrapper(*(word for path in order for word in ("--imgfile", path)))
        listed = {name: about["image_path"] for name, about in wrapper.listed().items()}
        assert listed == {"disk.img": str(image), str(other): str(other)}
        for name, path in (("disk.img", image), (str(image), image), (str(other), other)):
            with wrapper.connect() as client:
                client.greet()
                assert size_of(client, name) == path.stat().st_size
        wrapper.stop()


def test_an_image_of_a_c_xnbds_database_is_not_listed_twice(start_wrapper: StartWrapper, image: Path) -> None:
    (image.parent / "wrapper.db").write_text(
        f'{{"images": {{"{image}": {{"image_path": "{image}", "mode": "target"}}}}, "version": 2}}'
    )
    wrapper = start_wrapper("--imgfile", image)
    assert set(wrapper.listed()) == {str(image)}


def test_an_alias_goes_with_its_image(start_wrapper: StartWrapper, image: Path, other: Path) -> None:
    wrapper = start_wrapper("--imgfile", image)
    assert wrapper.ctl("--remove-by-exportname", image) == "removed disk.img\n"
    assert chooses(wrapper, str(image)) == ERR_UNKNOWN
    wrapper.ctl("--add-target", "disk.img", other)
    assert chooses(wrapper, str(image)) == ERR_UNKNOWN, "the name is another disk's now"
    wrapper.ctl("--add-target", image, other)
    assert chooses(wrapper, str(image)) == ACK, "an own name"


# The wrapper's command line


def words_of_register(directory: Path, port: int) -> List[str]:
    """The command line of the C xNBD's xnbd-register for a wrapper."""
    server = Path(command()[-1])
    return [
        "--daemonize",
        *("--dbpath", f"{directory}/db"),
        *("--logpath", f"{directory}/log"),
        *("--laddr", "127.0.0.1"),
        *("--port", str(port)),
        *("--socket", f"{directory}/ctl"),
        *("--xnbd-bgctl", str(server.with_name("xnbd-bgctl"))),
        *("--xnbd-server", str(server)),
        *("--max-queue-size", "2000"),
        *("--max-buf-size", "104857600"),
    ]


def words_in_letters(directory: Path, port: int) -> List[str]:
    files = ["-s", f"{directory}/ctl", "-L", f"{directory}/log", "--dbpath", f"{directory}/db"]
    return [f"-dp{port}", "-l", "127.0.0.1", *files, "-b", command()[-1], "-Q0", "-B", "0"]


@contextmanager
def in_background(control: Path, words: List[str]) -> Iterator[None]:
    env = {**os.environ, "PATH": f"{Path(command()[0]).parent}:{os.environ['PATH']}"}
    subprocess.run([*program("xnbd-wrapper"), *words], check=True, timeout=30, env=env)
    try:
        yield
    finally:
        run(*program("xnbd-wrapper-ctl"), "--socket", control, "--shutdown")


@pytest.mark.parametrize("words", [words_of_register, words_in_letters])
def test_a_wrapper_starts_as_it_did(tmp_path: Path, image: Path, words: Callable[[Path, int], List[str]]) -> None:
    port, control = free_port(), tmp_path / "ctl"
    with in_background(control, [*words(tmp_path, port), "-f", str(image)]):
        with RawClient(socket.create_connection(("127.0.0.1", port), timeout=60)) as client:
            client.greet()
            assert size_of(client, str(image)) == image.stat().st_size
            assert client.read(5, 5) == image.read_bytes()[5:10]
        assert run(*program("xnbd-wrapper-ctl"), "--socket", control, "-l")[0] == 0
    assert "xnbd-server[" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("old", "new"), [(["--port", "0"], ["--lport", "0"]), (["--xnbd-binary", "true"], ["-b", "true"])]
)
def test_an_old_name_beside_the_new_one_is_refused(tmp_path: Path, old: List[str], new: List[str]) -> None:
    status, out, err = run(*program("xnbd-wrapper"), "--dbpath", tmp_path / "db", *old, *new, check=False)
    long = {"-b": "--xnbd-server"}.get(new[0], new[0])
    assert (status, out, err) == (2, "", f"xnbd-wrapper: {old[0]} and {long} do not go together\n")


# The server's command line


def test_a_server_takes_letters(start: Start, image: Path, tmp_path: Path) -> None:
    log, port = tmp_path / "log of its own", free_port()
    server = start("-tr", f"-l{port}", "-L", log, image)
    with RawClient(socket.create_connection(("127.0.0.1", port), timeout=60)) as client:
        client.negotiate()
        assert client.read(5, 5) == image.read_bytes()[5:10]
        client.request(WRITE, 0, 1, data=b"x")
        assert client.closed()
    assert "serving" in log.read_text()
    assert server.log() == ""


def test_a_proxy_takes_letters(start: Start, image: Path, tmp_path: Path) -> None:
    origin = start("--target", image, tcp=True)
    files = [tmp_path / name for name in ("cache", "bitmap", "control")]
    proxy = start("-p", "-Q", "5", "-B1048576", "127.0.0.1", origin.port, *files)
    with RawClient(proxy.connect()) as client:
        client.negotiate()
        assert client.read(5, 5) == image.read_bytes()[5:10]
    queue = run(*program("xnbd-bgctl"), "-q", "--json", tmp_path / "control")[1]
    assert '"requests_limit": 5' in queue
    assert '"bytes_limit": 1048576' in queue


@pytest.mark.parametrize("words", [["-ti"], ["-t", "-i"], ["-t", "--ine"], ["-ri", "-c"]], ids=" ".join)
def test_inetd_takes_the_client_before_anything_else(image: Path, words: List[str]) -> None:
    """Standard output is the client's too, standard error is not."""
    ours, theirs = socket.socketpair()
    with (
        theirs,
        subprocess.Popen(
            command(*words, image), stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE
        ) as process,
    ):
        theirs.close()
        with RawClient(ours) as client:
            client.negotiate()
            assert client.read(5, 5) == image.read_bytes()[5:10]
        assert process.wait(60) == 0


def test_a_connected_descriptor_takes_a_letter(image: Path) -> None:
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    with subprocess.Popen(command("-t", "-F", fd, image), pass_fds=[fd]) as process:
        theirs.close()
        with RawClient(ours) as client:
            assert client.read(5, 5) == image.read_bytes()[5:10]
        assert process.wait(60) == 0


def test_version_and_help_take_letters() -> None:
    assert run(*command("-v"))[1].startswith("xnbd-server ")
    assert "Usage:" in run(*command("-h"))[1]


@pytest.mark.parametrize("words", [["-tc"], ["-t", "-l", "x"], ["-t", "-l"], ["-tz"], ["-G", "1"]], ids=" ".join)
def test_letters_that_make_no_sense_are_refused(image: Path, words: List[str]) -> None:
    assert fails(*words, image)[0] == 2


def test_terminating_signals_are_the_same(start: Start, image: Path) -> None:
    server = start("-t", image)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0

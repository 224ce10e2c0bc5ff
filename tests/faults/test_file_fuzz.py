"""A cache's files mutilated at random: a start repairs that, refuses, or serves what it should; never wrong bytes.

What is changed in the cache image without a change of its time, as by a disk that rots, the
checksums tell of blocks that clients have not written. Of others nothing can tell.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Callable, Dict, List, Set

import pytest
from caching import BLOCK, CacheFiles, connect, kill_server
from conftest import MIB, Start, unexpected_lines
from launch import launched
from server_process import Server, command, run, wait_until
from wrapper_process import Wrapper

ROUNDS = int(os.environ.get("XNBD_FUZZ_ROUNDS", "8"))
SIZE = 2 * MIB + 777
WRITTEN = b"by a client!" * 4096
TIME = 60.0


class Vault:
    """The files of a proxy that was stopped in good order, and copies from before that, with all attributes."""

    def __init__(self, directory: Path, start: Start, rng: random.Random) -> None:
        self.content = bytearray(rng.randbytes(SIZE))
        origin = directory / "origin.img"
        origin.write_bytes(self.content)
        self.far: Server = start("--target", "--readonly", origin)
        self._directory = directory
        self.written: Set[int] = set()
        files = CacheFiles(directory)
        self._work(start, files, rng)
        self.older, self._older_content = self._copy(files, "older"), bytes(self.content)
        self._work(start, files, rng)
        self.kept = self._copy(files, "kept")

    def _work(self, start: Start, files: CacheFiles, rng: random.Random) -> None:
        server = start(*files.arguments(self.far.uri, "--readahead", "0"))
        self.change(server, rng)
        server.stop()

    def change(self, server: Server, rng: random.Random) -> None:
        """Read a little, write a little, and have that durable."""
        client = connect(server.uri)
        at = rng.randrange(SIZE - len(WRITTEN))
        client.pread(100_000, rng.randrange(SIZE - 100_000))
        client.pwrite(WRITTEN, at)
        self.content[at : at + len(WRITTEN)] = WRITTEN
        self.written.update(range(at // BLOCK, (at + len(WRITTEN) - 1) // BLOCK + 1))
        client.flush()
        client.shutdown()

    def _copy(self, files: CacheFiles, name: str) -> CacheFiles:
        (self._directory / name).mkdir()
        run("cp", "-a", files.image, files.bitmap, files.state, files.sums, self._directory / name)
        return CacheFiles(self._directory / name)

    def take_out(self, name: str) -> CacheFiles:
        """The files as they were kept, in a directory of their own."""
        return self._copy(self.kept, name)

    def go_back(self) -> None:
        """Somebody put back a backup: the image with its state as they were then; the disk is what it was."""
        self.content[:] = self._older_content

    def is_right(self, found: bytes, *, rotten: bool) -> bool:
        """Whether a client may read this; of a *rotten* image what clients have written may be wrong."""
        differing = {block for block in range(-(-SIZE // BLOCK)) if found[block * BLOCK :][:BLOCK] != self.block(block)}
        return differing <= (self.written if rotten else set())

    def block(self, number: int) -> bytes:
        return bytes(self.content[number * BLOCK : (number + 1) * BLOCK])


Mutation = Callable[[Path, Path, random.Random], None]


def flip(path: Path, _older: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        for _ in range(rng.choice((1, 1, 30))):
            at = rng.randrange(path.stat().st_size)
            file.seek(at)
            octet = file.read(1)[0] ^ 1 << rng.randrange(8)
            file.seek(at)
            file.write(bytes([octet]))


def fill(path: Path, _older: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    start = rng.randrange(size)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(rng.choice((b"\xff", b"\0")) * rng.randint(1, min(4096, size - start)))


def zero(path: Path, _older: Path, _rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def shorten(path: Path, _older: Path, rng: random.Random) -> None:
    os.truncate(path, rng.choice((0, rng.randrange(path.stat().st_size))))


def lengthen(path: Path, _older: Path, rng: random.Random) -> None:
    os.truncate(path, path.stat().st_size + rng.choice((1, 8, 4096)))


def delete(path: Path, _older: Path, _rng: random.Random) -> None:
    path.unlink()


def exchange(path: Path, older: Path, rng: random.Random) -> None:
    path.unlink()
    run("cp", *rng.choice((["-a"], [])), older, path)


def write_older(path: Path, older: Path, _rng: random.Random) -> None:
    path.write_bytes(older.read_bytes())


def rot(path: Path, older: Path, rng: random.Random) -> None:
    """The disk does not keep what it had."""
    status = path.stat()
    rng.choice([flip, fill, zero, write_older])(path, older, rng)
    os.truncate(path, status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


STRUCTURE: List[Mutation] = [shorten, lengthen, delete, exchange]
ANYTHING: List[Mutation] = [*STRUCTURE, flip, flip, fill, fill, zero, write_older]


def mutilate(vault: Vault, files: CacheFiles, rng: random.Random, *, stopped: bool) -> str:
    """One of the files, or two; says which and how."""
    scoreboard = files.bitmap.with_name(f"{files.bitmap.name}.board")
    kinds: Dict[Path, List[Mutation]] = {
        files.image: [*STRUCTURE, write_older, zero] if stopped else STRUCTURE,
        files.bitmap: ANYTHING,
        files.state: ANYTHING,
        files.sums: ANYTHING,
    }
    if scoreboard.exists():
        kinds[scoreboard] = [mutation for mutation in ANYTHING if mutation not in (exchange, write_older)]
    done = {path: rng.choice(kinds[path]) for path in rng.sample(sorted(kinds), rng.choice((1, 1, 1, 2)))}
    for path, mutation in done.items():
        mutation(path, vault.older.image.with_name(path.name), rng)
    if all(done.get(path) in (exchange, write_older) for path in (files.image, files.state)):
        vault.go_back()
    return ", ".join(f"{mutation.__name__} {path.name}" for path, mutation in done.items())


def rot_image(vault: Vault, files: CacheFiles, rng: random.Random) -> str:
    """Of the cache image, and perhaps something is wrong with the sums too."""
    rot(files.image, vault.older.image, rng)
    mutation = rng.choice([*ANYTHING, None, None])
    if mutation is not None:
        mutation(files.sums, vault.older.sums, rng)
    return f"rotten image{f', {mutation.__name__} sums' if mutation is not None else ''}"


def outcome(files: CacheFiles, vault: Vault, *, rotten: bool = False) -> str:
    """``refused`` with one line, or ``right``: what a client reads is what it should be."""
    directory = files.image.parent
    log, sock = directory / "log", directory / "socket"
    line = command(*files.arguments(vault.far.uri), "--unix", sock)
    with launched(line, log) as server:
        wait_until(lambda: "INFO: serving" in server.log() or server.process.poll() is not None, "the outcome", TIME)
        if server.process.poll() is not None:
            assert server.process.returncode == 1
            assert sum("xnbd-server: " in line for line in server.log().splitlines()) == 1, server.log()
            return "refused"
        client = connect(f"nbd+unix:///?socket={sock}")
        assert vault.is_right(client.pread(SIZE, 0), rotten=rotten)
        client.shutdown()
    assert not unexpected_lines(server.log(), [])
    return "right"


@pytest.mark.timeout(60 + 30 * ROUNDS)
@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_mutilated_files_give_no_wrong_bytes(start: Start, tmp_path: Path, seed: int, end: str) -> None:
    rng = random.Random(f"{seed} {end}")
    vault = Vault(tmp_path, start, rng)
    untouched, written = bytes(vault.content), frozenset(vault.written)
    outcomes = []
    for number in range(ROUNDS):
        vault.content[:], vault.written = untouched, set(written)
        files = vault.take_out(f"round{number}")
        if end == "killed":
            server = start(*files.arguments(vault.far.uri, "--readahead", "0"))
            vault.change(server, rng)
            kill_server(server)
        rotten = rng.random() < 0.3
        what = rot_image(vault, files, rng) if rotten else mutilate(vault, files, rng, stopped=end == "stopped")
        print(number, what)
        outcomes.append(outcome(files, vault, rotten=rotten))
        run("rm", "-r", files.image.parent)
    assert set(outcomes) <= {"refused", "right"}


@pytest.mark.timeout(60 + 30 * ROUNDS)
def test_a_mutilated_database_gives_no_wrong_disk(tmp_path: Path, seed: int) -> None:
    """The wrapper refuses it with a line, or what it lists by its old path is served as it is."""
    rng = random.Random(f"{seed} database")
    images = [tmp_path / f"disk{number}.img" for number in range(3)]
    for image in images:
        image.write_bytes(rng.randbytes(65536))
    whole, older = tmp_path / "whole.db", tmp_path / "older.db"
    for database, arguments in ((older, images[:1]), (whole, images)):
        wrapper = Wrapper(tmp_path, [word for path in arguments for word in ("--imgfile", path)], database=database)
        wrapper.wait_until_ready()
        wrapper.stop()
    database = tmp_path / "mutilated.db"
    for number in range(max(3, ROUNDS // 2)):
        run("cp", whole, database)
        mutation = rng.choice([mutation for mutation in ANYTHING if mutation is not delete])
        mutation(database, older, rng)
        print(number, mutation.__name__)
        wrapper = Wrapper(tmp_path, database=database)
        try:
            wait_until(lambda: "INFO: serving" in wrapper.log() or wrapper.process.poll() is not None, "it", TIME)  # noqa: B023
            if wrapper.process.poll() is None:
                for name, export in wrapper.listed().items():
                    path = Path(export["image_path"])
                    if path in images:
                        with wrapper.client(name) as client:
                            assert client.read(0, 65536) == path.read_bytes()
            else:
                assert wrapper.log().count("\n") == 1, wrapper.log()
        finally:
            wrapper.stop()
        assert "Traceback" not in wrapper.log()

"""Power failures, simulated: what a disk may hold after one, whatever order the kernel wrote back in.

The real code runs on real files. `Recorder` looks at them at every line of it, and
is told of every sync that succeeded. From that it knows for each page all contents
that may be on the disk: those the page has had since its last sync. Names of files
go back to what any moment since the last sync of their directory showed.

`World` drives several processes' bitmaps of one cache at random. At lines picked at
random it lets another process act in the middle, or fails the power: it draws an
image of the disk from what is possible, opens it in "another boot" and compares it
with what was promised:

- a block whose bit is set holds its true data: nothing older than the last flush;
- a block that an answered flush covered has its bit set;
- a block that is set and not marked as written holds what the origin has.

After a sync that has failed no flush may succeed before everything was opened anew,
and what is there then has to keep the same promises.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import sys
import threading
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from xnbd.proxy.state import (
    belonging,
    checkpoint,
    copies,
    creation,
    entry,
    files,
    mending,
    opening,
    pages,
    resumption,
    scoreboard_file,
    shared,
    written,
)
from xnbd.proxy.state.belonging import ATTRIBUTE
from xnbd.proxy.state.checkpoint import ProcessState
from xnbd.proxy.state.format import Layout, layout_of
from xnbd.proxy.state.opening import open_state
from xnbd.proxy.state.shared import SharedState
from xnbd.storage import bitmap, writeback
from xnbd.storage.blocks import BLOCK, bytes_of
from xnbd.storage.writeback import WriteBackFailed
from xnbd.system import file_locks
from xnbd.system.file_locks import RangeLocks

SECTOR = 512
ORIGIN = "nbd://origin/disk"
_STATE = (
    *(belonging, checkpoint, copies, creation, entry, files, mending, opening, pages, resumption, scoreboard_file),
    shared,
    written,
)
_TRACED = {module.__file__ for module in (*_STATE, bitmap, file_locks, writeback)}


class _File:
    """Everything that may be on disk of one file, of which only the pages *watched* ever have content."""

    def __init__(self, fd: int, watched: Optional[List[int]]) -> None:
        self.fd = fd
        self._watched = None if watched is None else tuple(watched)
        self.sizes: List[int] = [0]
        self.marks: List[Tuple[bytes, int]] = []
        self.pages: Dict[int, List[bytes]] = {}
        self._seen: Dict[int, bytes] = {}

    def observe(self) -> None:
        size = os.fstat(self.fd).st_size
        if self.sizes[-1] != size:
            self.sizes.append(size)
        mark = _mark_of(self.fd)
        if mark not in self.marks[-1:]:
            self.marks.append(mark)
        for first, end in _runs(self._watched) if self._watched is not None else [(0, -(-size // BLOCK))]:
            content = os.pread(self.fd, (end - first) * BLOCK, first * BLOCK)
            if self._seen.get(first) != content:
                self._seen[first] = content
                self._note(first, content.ljust((end - first) * BLOCK, b"\0"))

    def _note(self, first: int, content: bytes) -> None:
        """The pages from *first* on have this *content* now."""
        for at in range(0, len(content), BLOCK):
            versions = self.pages.setdefault(first + at // BLOCK, [bytes(BLOCK)])
            if versions[-1] != content[at : at + BLOCK]:
                versions.append(content[at : at + BLOCK])

    def synced(self, *, marks: bool = True) -> None:
        """*marks* are not data: ``fdatasync(2)`` may leave them."""
        del self.sizes[:-1]
        if marks:
            del self.marks[:-1]
        for versions in self.pages.values():
            del versions[:-1]

    def write_crashed(self, path: Path, rng: random.Random) -> None:
        """Make *path* one of the files that may be left. Some draws are mostly old, some mostly new."""
        newest = rng.choice((0.0, 0.3, 0.7, 1.0))

        def pick(versions: List[bytes]) -> bytes:
            return versions[-1] if rng.random() < newest else rng.choice(versions)

        with path.open("wb") as file:
            for page, versions in self.pages.items():
                content = pick(versions)
                if len(versions) > 1 and rng.random() < 0.2:
                    content = b"".join(pick(versions)[at : at + SECTOR] for at in range(0, BLOCK, SECTOR))
                if any(content):
                    file.seek(page * BLOCK)
                    file.write(content)
            file.truncate(rng.choice(self.sizes))
        attribute, changed = rng.choice(self.marks)
        if attribute:
            os.setxattr(path, ATTRIBUTE, attribute)
        os.utime(path, ns=(changed, changed))


@lru_cache(None)
def _runs(pages: Tuple[int, ...]) -> List[Tuple[int, int]]:
    """First and end of each run of pages, which are in order."""
    runs: List[Tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs


def _used_pages(layout: Layout) -> List[int]:
    """The pages of a state file that anything is ever written to."""
    parts = ((0, layout.former_size), (layout.exposed, layout.sums + 4 * layout.pages), (layout.written, layout.size))
    return [page for start, stop in parts for page in range(start // BLOCK, -(-stop // BLOCK))]


def _mark_of(fd: int) -> Tuple[bytes, int]:
    """The mark of a cache image, and when it was changed."""
    try:
        return os.getxattr(fd, ATTRIBUTE), os.fstat(fd).st_mtime_ns
    except OSError:
        return b"", os.fstat(fd).st_mtime_ns


class Recorder:
    """What may be on disk of the files in *directory*, all of which is synced now.

    Of the large sparse file ``cache`` only the blocks *watched* are looked at, of the
    scoreboard, which no start after a power failure reads, only the first.
    """

    def __init__(self, directory: Path, watched: List[int]) -> None:
        self.directory = directory
        self.paused = False
        self._watched = watched
        self._files: Dict[int, _File] = {}
        self._names: List[Dict[str, int]] = [{}]
        self.observe()
        for file in self._files.values():
            file.synced()
        del self._names[:-1]

    def observe(self) -> None:
        names: Dict[str, int] = {}
        for found in os.scandir(self.directory):
            names[found.name] = found.inode()
            if found.inode() not in self._files:
                fd = os.open(found.path, os.O_RDONLY)
                self._files[found.inode()] = _File(fd, self._pages_of(found.name))
        if self._names[-1] != names:
            self._names.append(names)
        for file in self._files.values():
            file.observe()

    def _pages_of(self, name: str) -> Optional[List[int]]:
        """Those that are looked at; None: all of them. Nobody here notes sums, so that their file has a header only."""
        if name == "cache":
            return self._watched
        if name.endswith((".board", ".checked", ".sums")):
            return [0]
        return _used_pages(layout_of((self.directory / "cache").stat().st_size)) if ".state" in name else None

    def synced(self, fd: int, *, marks: bool) -> None:
        if self.paused:
            return
        inode = os.fstat(fd).st_ino
        self.observe()
        if inode in self._files:
            self._files[inode].synced(marks=marks)
        elif inode == self.directory.stat().st_ino:
            del self._names[:-1]

    def fail_power(self, image: Path, rng: random.Random) -> None:
        """Put into the directory *image* one of the states the disk may be in."""
        for name, inode in rng.choice(self._names).items():
            self._files[inode].write_crashed(image / name, rng)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file.fd)


@contextmanager
def watching_syncs(
    on_synced: Callable[[int, bool], None], before: Optional[Callable[[int], None]] = None
) -> Iterator[None]:
    """Tell of the descriptor of every ``fsync(2)`` (True) and ``fdatasync(2)`` here after it succeeded.

    What *before* raises is the sync's error, and nothing is synced.
    """
    real = {name: getattr(os, name) for name in ("fsync", "fdatasync")}

    def watched(sync: Callable[[int], None], whole: bool) -> Callable[[int], None]:
        def call(fd: int) -> None:
            if before is not None:
                before(fd)
            sync(fd)
            on_synced(fd, whole)

        return call

    try:
        for name, sync in real.items():
            setattr(os, name, watched(sync, name == "fsync"))
        yield
    finally:
        for name, sync in real.items():
            setattr(os, name, sync)


@contextmanager
def at_every_line(action: Callable[[], None]) -> Iterator[None]:
    """Call *action* before every line of the code under test that runs in here."""

    def on_line(_frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            action()
        return on_line

    def on_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        return on_line if frame.f_code.co_filename in _TRACED else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


class Paused:
    """*work* in a thread, which stops before its *line*-th line of the code under test until it is told to go on."""

    def __init__(self, work: Callable[[], None], line: int) -> None:
        self.reached = False
        self._work = work
        self._lines_left = line
        self._stopped, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._stopped.wait()

    def _run(self) -> None:
        try:
            with at_every_line(self._on_line):
                self._work()
        finally:
            self._stopped.set()

    def _on_line(self) -> None:
        self._lines_left -= 1
        if not self._lines_left:
            self.reached = True
            self._stopped.set()
            self._go.wait()

    def finish(self) -> None:
        self._go.set()
        self._thread.join()


FETCHED = 0
"""The serial of what the origin has."""


def content_of(block: int, serial: int) -> bytes:
    """What the write number *serial* puts into *block*; never zeros."""
    return struct.pack("<II", block, serial) * (BLOCK // 8)


class Promises:
    """What clients were told: the contents each block has had, which of them was answered, which flushed."""

    def __init__(self) -> None:
        self.contents: Dict[int, List[bytes]] = {}
        self.answered: Dict[int, int] = {}
        self.flushed: Dict[int, int] = {}
        self._promised: Dict[int, int] = {}

    def trouble(self, block: int, is_set: bool, is_written: bool, content: bytes) -> Optional[str]:
        """What is wrong with *block* as it was found after a power failure."""
        if not is_set:
            return f"block {block} was flushed, and is forgotten" if block in self.flushed else None
        if not is_written and content != content_of(block, FETCHED):
            return f"block {block} counts as the origin's and holds {content[:8]!r}"
        allowed = self.contents.get(block, [])[self.flushed.get(block, 0) :]
        for at in range(0, BLOCK, SECTOR):
            if content[at : at + SECTOR] not in [one[at : at + SECTOR] for one in allowed]:
                return f"block {block} is set and holds {content[at : at + 8]!r} at {at}, of {len(allowed)} allowed"
        return None

    def let_go(self, block: int) -> None:
        """It need not be there any more, and what it has if it is, the origin has too."""
        for promise in (self.answered, self.flushed, self._promised):
            promise.pop(block, None)

    def begin_flush(self) -> None:
        """All that was answered is to become durable."""
        self._promised = dict(self.answered)

    def end_flush(self) -> None:
        """It is, but for what was let go meanwhile."""
        self.flushed.update(self._promised)

    def found(self, block: int, is_set: bool, content: bytes) -> None:
        """Go on with what a power failure has left."""
        for promise in (self.contents, self.answered, self.flushed):
            promise.pop(block, None)
        if is_set:
            self.contents[block] = [content]
            self.answered[block] = self.flushed[block] = 0


class Odds(NamedTuple):
    """How often something happens at a line, or instead of a sync."""

    intrusion: float
    power_failure: float
    power_failure_in_flush: float
    failed_sync: float


class World:
    """One cache of *disk_size* bytes, of which only *blocks* are ever used, under several processes."""

    def __init__(self, scratch: Path, disk_size: int, blocks: List[int], rng: random.Random, odds: Odds) -> None:
        self.failures = 0
        self.failed_syncs = 0
        self._failed = False
        self._scratch = scratch
        self._disk_size = disk_size
        self._blocks = blocks
        self._rng = rng
        self._odds = odds
        self._serial = 0
        self._directories = 0
        self._flushing = False
        self._promises = Promises()
        self._also: Optional[Promises] = None
        self._boot = 1
        self.directory = self._new_directory()
        with (self.directory / "cache").open("wb") as cache:
            cache.truncate(disk_size)
        self._recorder = Recorder(self.directory, blocks)
        self._cache_fd = os.open(self.directory / "cache", os.O_RDWR)
        self.shared: Optional[SharedState] = None
        self._processes: List[ProcessState] = []
        self._others: List[ProcessState] = []

    def _new_directory(self) -> Path:
        self._directories += 1
        directory = self._scratch / str(self._directories)
        directory.mkdir()
        return directory

    # What happens

    def run(self, steps: int) -> None:
        actions = [self.write] * 12 + [self.let_go, self.cover] * 2 + [self.flush] * 5
        actions += [self.restart, self.exit_and_start, self.reboot, self.clear]
        with watching_syncs(lambda fd, whole: self._recorder.synced(fd, marks=whole), self._maybe_fail_sync):
            self.start()
            for _ in range(steps):
                self._rng.choice(actions)()
        self._close()

    def start(self, *, clear: bool = False) -> None:
        """Open the files as a server does; the power may fail at any line."""
        with at_every_line(self._maybe_fail_power):
            self.shared = self._open(self.directory, self._cache_fd, self._boot, clear=clear)
            self._processes = [self.shared.open_process() for _ in range(3)]

    def write(self) -> None:
        process, *self._others = self._rng.sample(self._processes, 3)
        with at_every_line(self._disturb):
            self._write(process)

    def flush(self) -> None:
        process, *self._others = self._rng.sample(self._processes, 3)
        with at_every_line(self._disturb):
            self._flush(process)

    def let_go(self) -> None:
        process, *self._others = self._rng.sample(self._processes, 3)
        with at_every_line(self._disturb):
            self._let_go(process)

    def cover(self) -> None:
        """A steward finds that nothing was marked for a while."""
        process, *self._others = self._rng.sample(self._processes, 3)
        with at_every_line(self._disturb):
            process.cover(range(2))

    def restart(self) -> None:
        """Everything dies, the system stays up."""
        self._leave()
        self.start()
        self._go_on()

    def exit_and_start(self) -> None:
        shared = self.shared
        assert shared is not None
        for process in self._processes:
            process.close()
        self._processes = []
        promised = dict(self._promises.answered)
        with at_every_line(self._maybe_fail_power):
            try:
                assert shared.mark_clean(self._cache_fd)
                assert not self._failed
                self._promises.flushed.update(promised)
            except WriteBackFailed:
                assert self._failed
        shared.close()
        self.shared = None
        self._boot += self._rng.random() < 0.5
        self.start()
        self._go_on()

    def clear(self) -> None:
        """Until it is done, either everything is as before or nothing is cached."""
        self._leave()
        self._also = Promises()
        self.start(clear=True)
        self._promises, self._also = self._also, None
        self._failed = False

    def reboot(self) -> None:
        """The power fails, and things go on from there."""
        image = self._new_directory()
        self._recorder.fail_power(image, self._rng)
        self._close()
        self.directory = image
        self._recorder = Recorder(image, self._blocks)
        self._cache_fd = os.open(image / "cache", os.O_RDWR)
        self._boot += 1
        self.start()
        self._compare()

    def _go_on(self) -> None:
        """Everything was opened anew: what a failed sync has left in doubt may be forgotten."""
        if self._failed:
            self._compare()

    def _compare(self) -> None:
        """What is there now keeps the promises; go on with that."""
        self._failed = False
        view = self._processes[0].bitmap
        troubles = self._troubles(self._promises, self._processes[0], self._cache_fd)
        assert not troubles, troubles
        for block in self._blocks:
            self._promises.found(block, block in view, os.pread(self._cache_fd, BLOCK, block * BLOCK))

    # Processes

    def _open(self, directory: Path, cache_fd: int, boot: int, *, clear: bool = False) -> SharedState:
        boot_id = self._scratch / f"boot{boot}"
        boot_id.write_text(f"{boot:032x}\n")
        return open_state(
            str(directory / "bitmap"),
            cache_fd,
            disk_size=self._disk_size,
            origin=ORIGIN,
            clear=clear,
            thorough=self._rng.random() < 0.5,  # else a page that does not fit fails the first process that changes it
            boot_id_path=str(boot_id),
        )

    def _write(self, process: ProcessState) -> None:
        """Write a block or two as a proxy does, or fetch them: under their lock, or in place if they are marked."""
        first = self._rng.choice(self._blocks)
        end = first + 1 + (first + 1 in self._blocks and self._rng.random() < 0.5)
        fills = RangeLocks(process.fd)
        start, count = bytes_of(first, end)
        if process.bitmap.all_set(first, end) and process.written.all_set(first, end):
            self._put(first, end)
        elif fills.try_acquire(start, count):
            try:
                if self._rng.random() < 0.9:
                    self._fill(process, first, end)
            finally:
                fills.release(start, count)

    def _fill(self, process: ProcessState, first: int, end: int) -> None:
        """Some of these blocks are missing or clean; they are locked. Now and then it does not come to its end."""
        some_here = process.bitmap.any_set(first, end)
        if not some_here and self._rng.random() < 0.4:
            self._put(first, end, done=False, serial=FETCHED)
        elif some_here:
            process.written.set(first, end)
            self._put(first, end, done=False)
        else:
            self._put(first, end, done=False)
            process.written.set(first, end)
        if self._rng.random() < 0.95:
            process.bitmap.set(first, end)
            self._answer(first, end)

    def _let_go(self, process: ProcessState) -> None:
        """Let a clean block go, as `proxy.letting_go` does where nobody holds it; now and then not to the end."""
        block = self._rng.choice(self._blocks)
        fills = RangeLocks(process.fd)
        start, count = bytes_of(block, block + 1)
        if not fills.try_acquire(start, count):
            return
        try:
            if block in process.bitmap and block not in process.written:
                process.bitmap.clear(block, block + 1)
                self._promises.let_go(block)
                if self._rng.random() < 0.8 and self._flush(process) and self._rng.random() < 0.9:
                    os.pwrite(self._cache_fd, bytes(BLOCK), block * BLOCK)
                    self._recorder.observe()
        finally:
            fills.release(start, count)

    def _put(self, first: int, end: int, *, done: bool = True, serial: Optional[int] = None) -> None:
        if serial is None:
            self._serial += 1
            serial = self._serial
        for block in range(first, end):
            content = content_of(block, serial)
            self._promises.contents.setdefault(block, []).append(content)
            os.pwrite(self._cache_fd, content, block * BLOCK)
        self._recorder.observe()
        if done:
            self._answer(first, end)

    def _answer(self, first: int, end: int) -> None:
        for block in range(first, end):
            self._promises.answered[block] = len(self._promises.contents[block]) - 1

    def _flush(self, process: ProcessState) -> bool:
        """Flush; an error is an answer too, promises nothing, and is followed by another one. Whether it was none."""
        failed = self._failed
        self._promises.begin_flush()
        self._flushing = True
        try:
            process.checkpoint(self._cache_fd)
            assert not failed
        except WriteBackFailed:
            assert self._failed
            return False
        finally:
            self._flushing = False
        self._promises.end_flush()
        return True

    def _leave(self) -> None:
        for process in self._processes:
            process.close()
        if self.shared is not None:
            self.shared.close()
        self._processes, self.shared = [], None

    def _close(self) -> None:
        self._leave()
        self._recorder.close()
        os.close(self._cache_fd)

    # In the middle of a line

    def _disturb(self) -> None:
        self._recorder.observe()
        while self._rng.random() < self._odds.intrusion:
            process = self._rng.choice(self._others)
            if self._flushing or self._rng.random() < 0.6:
                self._write(process)
            else:
                self._flush(process)
            self._recorder.observe()
        self._maybe_fail_power()

    def _maybe_fail_sync(self, _fd: int) -> None:
        if self._flushing and not self._recorder.paused and self._rng.random() < self._odds.failed_sync:
            self.failed_syncs += 1
            self._failed = True
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _maybe_fail_power(self) -> None:
        self._recorder.observe()
        odds = self._odds.power_failure_in_flush if self._flushing else self._odds.power_failure
        if self._rng.random() < odds:
            image = self._new_directory()
            self._recorder.fail_power(image, self._rng)
            self._check(image)
            for path in image.iterdir():
                path.unlink()
            image.rmdir()

    def _check(self, image: Path) -> None:
        """Open what the power failure has left; it has to be as promised."""
        self.failures += 1
        self._recorder.paused = True
        cache_fd = os.open(image / "cache", os.O_RDWR)
        shared = self._open(image, cache_fd, self._boot + 1)
        process = shared.open_process()
        troubles = [self._troubles(promises, process, cache_fd) for promises in (self._promises, self._also)]
        process.close()
        shared.close()
        os.close(cache_fd)
        self._recorder.paused = False
        assert not all(troubles), troubles

    def _troubles(self, promises: Optional[Promises], process: ProcessState, cache_fd: int) -> List[str]:
        if promises is None:
            return ["not promised"]
        found = (
            promises.trouble(block, block in process.bitmap, block in process.written, content)
            for block, content in ((block, os.pread(cache_fd, BLOCK, block * BLOCK)) for block in self._blocks)
        )
        return [trouble for trouble in found if trouble]

"""A bitmap's files that are there already: checked, judged, and made to agree before a server goes on with them.

All that may speak against them is looked at before anything is changed, but for a
failed write-back: whoever hears of one notes it at once.
"""

from __future__ import annotations

import os
from contextlib import closing, suppress
from typing import List, Optional

from ...errors import ConfigurationError
from ...logs import log
from ...origin.address import place_of, places_of
from ...storage.failure import drop_cached
from ...storage.space import NO_SPACE
from ...storage.target import reopen
from ...storage.writeback import WriteBackFailed
from ...text import counted
from . import belonging, copies, files, mending
from .belonging import NO_ID
from .checkpoint import ProcessState
from .copies import Comparison
from .entry import Entry
from .format import NO_BOOT, VERSION, BadHeader, Header, UnknownVersion, identity, readable
from .known import was_switched
from .scoreboard_file import refuse_other_version
from .sums_file import forget_checkpoints, last_checkpoint, sync_sums
from .verdict import Facts, Trust, Verdict, judge, trust_in_marks

_WITHOUT_STATE = (
    "move it away, and start with --adopt-cache once: unless the power has failed since the proxy ran, "
    "nothing is lost by that"
)


def resume(entry: Entry, state_fd: int) -> None:
    """Go on with the files, alone or with the servers that use them. Raises `ConfigurationError`."""
    found = _check_state(entry, state_fd)
    if files.is_alone(state_fd):
        _Resumption(entry, state_fd, found).run()
    else:
        _join(entry, state_fd, found)


def _join(entry: Entry, state_fd: int, found: Header) -> None:
    if found.boot_id != entry.header.boot_id:
        raise ConfigurationError(f"cache bitmap {entry.path} is in use on another machine: stop that server first")
    if found.version != VERSION:
        raise ConfigurationError(f"cache bitmap {entry.path} is in use by an older xnbd-server: stop that one first")
    refuse_other_version(entry)
    entry.bind(found.tie)
    entry.use_cache(alone=False)
    _check_cache(entry, _in_this_life(found, state_fd), switched=False)
    os.close(entry.open_bitmap())
    log.info("cache bitmap %s: resumed, shared with another server", entry.path)
    if found.clean:
        files.write_header(state_fd, entry.header)


def _in_this_life(found: Header, state_fd: int) -> Header:
    """Of files that were not used elsewhere since: the cache image is known to have borne its last session."""
    if files.shown_session(state_fd) != found.tie.session:
        return found
    return found._replace(tie=found.tie._replace(previous=belonging.NO_SESSION))


def _check_cache(entry: Entry, found: Header, *, switched: bool) -> None:
    """Raises `ConfigurationError` if the files speak of another cache image, or of this one at another time."""
    reason = belonging.stranger(found.tie, entry.cache_fd, clean=found.clean, switched=switched)
    if reason:
        raise entry.refusal(
            f"the cache image {reason}; put the right one back, or if all of {entry.path} is in this one believe it "
            "with --adopt-cache"
        )


def _read_header(entry: Entry, state_fd: int) -> Header:
    """Raises `ConfigurationError`. No option replaces a damaged file, of which nobody can tell what it was."""
    try:
        return files.read_header(state_fd)
    except UnknownVersion as error:
        raise entry.refusal(f"state file {entry.state_path} {error}: start the newer xnbd-server") from error
    except BadHeader as error:
        raise entry.refusal(f"state file {entry.state_path} {error}; {_WITHOUT_STATE}") from error


def _check_state(entry: Entry, state_fd: int) -> Header:
    """The header, if the file is of this disk. Raises `ConfigurationError`."""
    header = _read_header(entry, state_fd)
    wanted = entry.header
    if header.disk_size != wanted.disk_size:
        raise entry.refusal(
            f"{entry.path} is of a disk of {header.disk_size} bytes, and the origin has {wanted.disk_size}"
        )
    if header.block_size != wanted.block_size:
        raise entry.refusal(f"{entry.path} has blocks of {header.block_size} bytes, not {wanted.block_size}")
    first, moved = header.origin.decode("utf-8", "surrogateescape"), files.read_steering(state_fd).address
    known = {identity(place) for place in (place_of(first), *places_of(moved))}
    if known.isdisjoint(identity(place) for place in places_of(entry.origin)):
        raise entry.refusal(
            f"{entry.path} is of the origin {readable(header.origin)}, not of {readable(wanted.origin)}; "
            "if that disk has moved, start with the former address and use xnbd-bgctl --reconnect"
        )
    entry.header = wanted._replace(origin=header.origin)
    if header.version == VERSION:
        entry.check_size(state_fd, entry.state_path, entry.layout.size, _WITHOUT_STATE)
    elif not entry.layout.former_size < os.fstat(state_fd).st_size <= entry.layout.size:  # else it has begun to grow
        entry.check_size(state_fd, entry.state_path, entry.layout.former_size, _WITHOUT_STATE)
    return header


class _Resumption:
    """Of files with the header *found* that nobody uses."""

    def __init__(self, entry: Entry, state_fd: int, found: Header) -> None:
        self._entry = entry
        self._state_fd = state_fd
        self._found = found
        entry.former_sessions = {found.tie.session, found.tie.previous}
        mounts = belonging.mount_of(entry.cache_fd), belonging.mount_of(state_fd)
        same_mounts = found.tie.id == NO_ID or (found.tie.cache_mount, found.tie.state_mount) == mounts
        self._lived = found.boot_id == entry.header.boot_id and same_mounts
        self._switched = was_switched(entry.path, self._state_fd, entry.header.boot_id)
        self._untouched = False
        self._different: List[int] = []
        self._looked_at: Optional[List[int]] = None
        """Pages of the bitmap: all if it is not said."""
        self._facts = Facts(made=False)

    def run(self) -> None:
        entry, found = self._entry, self._found
        entry.bind(belonging.new_tie(entry.cache_fd, self._state_fd) if found.tie.id == NO_ID else found.tie)
        entry.use_cache(alone=True)
        self._check_cache()
        if found.boot_id == NO_BOOT:
            self._finish_making()
        else:
            self._refuse_older_state()
            self._make_agree()
        self._begin_session()

    def _check_cache(self) -> None:
        """As `_check_cache`, unless there is nothing to lose or somebody vouches for it."""
        if self._entry.adopt:
            return
        try:
            found = _in_this_life(self._found, self._state_fd) if self._lived else self._found
            _check_cache(self._entry, found, switched=self._switched)
        except ConfigurationError:
            if not self._is_nothing_cached() or belonging.holds_data(self._entry.cache_fd):
                raise

    def _refuse_older_state(self) -> None:
        """After a kill the sums know a checkpoint that a copy from before it does not. Raises `ConfigurationError`."""
        entry, found = self._entry, self._found
        if not self._lived or found.clean or entry.adopt:
            return
        session, number = last_checkpoint(entry)
        if session == found.tie.session and number > files.succeeded(self._state_fd):
            raise entry.refusal(
                f"{entry.state_path} is an older copy, of before the last checkpoint of the servers that died; "
                "put the right files back, or believe the bitmap with --adopt-cache"
            )

    def _is_nothing_cached(self) -> bool:
        layout = self._entry.layout
        if copies.count_set(self._state_fd, layout, layout.durable):
            return False
        bitmap_fd = self._entry.open_bitmap()
        try:
            return not copies.count_set(bitmap_fd, layout, 0)
        finally:
            os.close(bitmap_fd)

    def _finish_making(self) -> None:
        self._allocate_state()
        mending.make_empty(self._state_fd, self._entry.layout)
        self._entry.make_bitmap()
        files.publish(self._entry.path)
        if files.read_failure(self._state_fd) is not None:  # which means nothing: no block is cached
            files.failure_record(self._state_fd).clear()
        log.info("cache bitmap %s: made, which an earlier start did not finish", self._entry.path)

    def _make_agree(self) -> None:
        bitmap_fd = self._entry.open_bitmap()
        try:
            self._hear_of_failures()
            verdict = self._judge(bitmap_fd)
            if self._switched:
                self._refuse_if_incomplete(bitmap_fd, verdict)
            self._settle(bitmap_fd, verdict)
        finally:
            os.close(bitmap_fd)

    def _hear_of_failures(self) -> None:
        """Servers that were killed have not been told of what could not be written since: it is noted now."""
        with suppress(WriteBackFailed):
            files.write_back(self._state_fd).sync(self._entry.cache_fd)

    def _judge(self, bitmap_fd: int) -> Verdict:
        """Raises `ConfigurationError` if the copies contradict each other."""
        found, failed = self._found, files.read_failure(self._state_fd) is not None
        has_checksum = found.clean and found.tie.id != NO_ID
        basis = Facts(True, found.clean, self._lived, failed, checksum=has_checksum, adopt=self._entry.adopt)
        times = files.times_of(bitmap_fd, self._state_fd)
        self._untouched = found.clean and not failed and times == found.closed
        if self._untouched:
            self._facts = basis._replace(alike=True, explained=True, live_fits=has_checksum, durable_fits=has_checksum)
            return judge(self._facts)
        comparison = self._compare(bitmap_fd, failed=failed)
        self._different = comparison.pages
        self._facts = self._with_copies(basis, bitmap_fd, comparison)
        verdict = judge(self._facts)
        if verdict is Verdict.REFUSE:
            raise self._contradiction(comparison)
        return verdict

    def _compare(self, bitmap_fd: int, *, failed: bool) -> Comparison:
        """Of all pages, but after a kill only of those that were changed last, if others need not be looked at now."""
        entry, found, told = self._entry, self._found, self._found.version == VERSION
        killed = self._lived and not found.clean and not failed and not self._switched
        if killed and told and not entry.thorough and not entry.adopt:
            self._looked_at = copies.marked_pages(self._state_fd, entry.layout)
        return copies.compare(bitmap_fd, self._state_fd, entry.layout, told=told, pages=self._looked_at)

    def _with_copies(self, basis: Facts, bitmap_fd: int, comparison: Comparison) -> Facts:
        """What is known of the two copies, besides what *basis* has."""
        layout, noted = self._entry.layout, self._found.tie.checksum
        return basis._replace(
            alike=comparison.alike,
            explained=comparison.explained,
            live_fits=basis.checksum and copies.checksum(bitmap_fd, layout, 0) == noted,
            durable_fits=basis.checksum and copies.checksum(self._state_fd, layout, layout.durable) == noted,
        )

    def _contradiction(self, comparison: Comparison) -> ConfigurationError:
        entry = self._entry
        told = f"has {counted(comparison.forgotten, 'block')} that its copy in {entry.state_path} has not, and lacks "
        if comparison.alike:
            told = f"and its copy in {entry.state_path} were changed since they were closed: their checksum is wrong"
        else:
            told += str(comparison.missing)
        return entry.refusal(f"{entry.path} {told}; put the right files back, or believe the bitmap with --adopt-cache")

    def _refuse_if_incomplete(self, bitmap_fd: int, verdict: Verdict) -> None:
        """A plain target has written to the image since it was a proxy's: fine if no block was missing then.

        That is looked up in the copy that counts.
        """
        entry = self._entry
        fd, at = (self._state_fd, entry.layout.durable) if verdict is Verdict.DURABLE else (bitmap_fd, 0)
        missing = entry.layout.blocks - copies.count_set(fd, entry.layout, at)
        if missing:
            raise ConfigurationError(
                f"{entry.path}: the proxy was switched to a plain target by force with {counted(missing, 'block')} "
                "missing: serve the cache image with --target, or start afresh with --clear-bitmap, "
                "which forgets what clients have written"
            )

    def _settle(self, bitmap_fd: int, verdict: Verdict) -> None:
        """Make live bitmap and durable copy agree; nobody else uses them."""
        entry, state_fd = self._entry, self._state_fd
        entry.remove_unfinished()
        files.allocate(bitmap_fd, entry.layout.bitmap_size)
        self._allocate_state()
        forget_checkpoints(entry)
        files.reset_numbers(state_fd)
        if verdict is Verdict.LIVE:
            with suppress(WriteBackFailed):  # which is noted, so it is the durable copy that counts
                if not self._untouched:
                    self._save_live(bitmap_fd)
                self._settle_marks(bitmap_fd, verdict)
                log.info("cache bitmap %s: resumed", entry.path)
                return
        self._restore_durable(bitmap_fd)

    def _allocate_state(self) -> None:
        """A file of an older version grows by this. Raises `ConfigurationError` if there is no room for that."""
        entry = self._entry
        try:
            files.allocate(self._state_fd, entry.layout.size)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise ConfigurationError(
                f"{entry.state_path} of version {self._found.version} has to grow to {entry.layout.size} bytes, "
                "and there is no room: make some"
            ) from error

    def _settle_marks(self, bitmap_fd: int, verdict: Verdict) -> None:
        """Have the written map agree with the bitmap, which does not change any more. Raises `OSError`."""
        entry, state_fd, found = self._entry, self._state_fd, self._found
        facts = self._facts._replace(failed=files.read_failure(state_fd) is not None)
        told = found.version == VERSION
        trust = trust_in_marks(verdict, facts, told=told, switched=self._switched)
        entry.has_clean_blocks = trust is not Trust.NOTHING
        if trust is Trust.MAP and self._looked_at is not None:
            entry.seen = self._looked_at
            return
        if trust is Trust.MAP and self._untouched:
            return
        doubtful = mending.settle(bitmap_fd, state_fd, entry.layout, trust, closed=found.clean)
        if trust is Trust.NOTHING:
            log.info("cache bitmap %s: all blocks that are cached count as written by clients", entry.path)
        elif doubtful:
            doubt = counted(
                doubtful, "block counts as written by clients, as it", "blocks count as written by clients, as they"
            )
            log.warning("cache bitmap %s: %s may be", entry.path, doubt)

    def _save_live(self, bitmap_fd: int) -> None:
        """Raises `OSError`."""
        state_fd, layout = self._state_fd, self._entry.layout
        for page in self._different:
            copies.claim(state_fd, layout, page)
        sync_sums(self._entry)
        process = ProcessState(reopen(bitmap_fd, readonly=False), reopen(state_fd, readonly=False), layout)
        with closing(process):
            if process.changed:
                process.checkpoint(self._entry.cache_fd)

    def _restore_durable(self, bitmap_fd: int) -> None:
        """After a failed write-back nothing else may come back."""
        forgotten = 0
        for difference in copies.differences(bitmap_fd, self._state_fd, self._entry.layout):
            copies.restore_durable(bitmap_fd, difference)
            forgotten += difference.forgotten
        reason = self._reason()
        self._settle_marks(bitmap_fd, Verdict.DURABLE)
        if files.read_failure(self._state_fd) is not None:
            drop_cached(self._entry.cache_fd)
            copies.forget_failure(bitmap_fd, self._state_fd, self._entry.layout)
        log.warning("cache bitmap %s: %s, %s forgotten", self._entry.path, reason, counted(forgotten, "block"))

    def _reason(self) -> str:
        """Why the durable copy counts, for the log."""
        failure = files.read_failure(self._state_fd)
        if failure is not None:
            return f"recovered after a failed write-back ({os.strerror(failure.number)})"
        if self._found.clean:
            return "repaired from its copy in the state file, for it was changed while it was closed"
        if self._found.boot_id != self._entry.header.boot_id:
            return "recovered after a power failure"
        return "recovered, for its servers died and the mount is another one than theirs"

    def _begin_session(self) -> None:
        """Tie the files together anew. A power failure may leave the old session on the cache image."""
        entry, state_fd, found = self._entry, self._state_fd, self._found.tie
        # What was killed, or copied here, may not be on the disk yet, nor its mark.
        files.write_back(state_fd).sync(entry.cache_fd, metadata=True)
        mark = belonging.read_mark(entry.cache_fd)
        entry.bind(belonging.renewed(entry.header.tie, entry.cache_fd, state_fd))
        if not found.marked or mark is None or mark.id != found.id:
            self._mark_afresh()
            return
        entry.bind(entry.header.tie._replace(previous=mark.session))
        files.write_header(state_fd, entry.header)
        if not belonging.write_mark(entry.cache_fd, entry.header.tie):
            self._bind_unmarked()
        files.note_shown(state_fd, entry.header.tie.session)

    def _mark_afresh(self) -> None:
        """On a cache image that bears no mark, or another one: the header says so until it does."""
        entry, state_fd = self._entry, self._state_fd
        self._bind_unmarked()
        entry.mark(state_fd)
        if entry.header.tie.marked:
            files.write_header(state_fd, entry.header)
            files.note_shown(state_fd, entry.header.tie.session)

    def _bind_unmarked(self) -> None:
        self._entry.bind(self._entry.header.tie._replace(marked=False))
        files.write_header(self._state_fd, self._entry.header)

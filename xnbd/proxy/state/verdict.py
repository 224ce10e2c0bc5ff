"""Which copy of a bitmap counts, and what the written map tells: decided here alone, of files that nobody uses.

The module reads and writes nothing. It keeps one rule: where what vouches for the bits
contradicts itself, less is believed, never more. Of the written map that is: more counts
as written, never less.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Verdict(Enum):
    """What a server does that is alone with the files."""

    MAKE = "make an empty bitmap"
    LIVE = "go on with the live bitmap"
    DURABLE = "replace the live bitmap by the durable copy"
    REFUSE = "change nothing, and do not start"


class Facts(NamedTuple):
    """What is known of the files; where nothing is said, the worst.

    *made*: the header names a boot. *clean*: the files were closed in good order.
    *lived*: this is the boot in which they were used last, and these are the mounts, as far
    as that was noted. *failed*: a write-back has failed. *alike*: live bitmap and durable
    copy are the same; *explained*: they are, or differ only on pages that are marked, by blocks
    more in the live bitmap, or by clean blocks less, which were let go. *checksum*: one was
    noted when the files were closed; *live_fits*, *durable_fits*: it is the one of that copy.
    *adopt*: the operator vouches for the live bitmap.
    """

    made: bool
    clean: bool = False
    lived: bool = False
    failed: bool = True
    alike: bool = False
    explained: bool = False
    checksum: bool = False
    live_fits: bool = False
    durable_fits: bool = False
    adopt: bool = False


def judge(facts: Facts) -> Verdict:
    """What to do with the files. The first row that fits counts.

    =====  ===============  ======  ==========================  ==================  =======
    made   closed, or used  failed  the two copies              adopt: no           yes
    =====  ===============  ======  ==========================  ==================  =======
    no     any              any     any                         MAKE                MAKE
    yes    closed           yes     the durable one fits        DURABLE             DURABLE
    yes    closed           yes     it does not fit             REFUSE              DURABLE
    yes    closed           no      both fit                    LIVE                LIVE
    yes    closed           no      the durable one fits        DURABLE             LIVE
    yes    closed           no      the live one fits           LIVE                LIVE
    yes    closed           no      none fits                   REFUSE              LIVE
    yes    closed, no sum   yes     alike                       DURABLE             DURABLE
    yes    closed, no sum   no      alike                       LIVE                LIVE
    yes    closed, no sum   yes     different                   REFUSE              DURABLE
    yes    closed, no sum   no      different                   REFUSE              LIVE
    yes    used elsewhere   any     any                         DURABLE             DURABLE
    yes    used here        yes     any                         DURABLE             DURABLE
    yes    used here        no      alike, or explained         LIVE                LIVE
    yes    used here        no      not explained               REFUSE              LIVE
    =====  ===============  ======  ==========================  ==================  =======

    *Fits* is said of the checksum; *no sum*: a state file of version 1 has none. *Used*: not
    closed; *here*: in this boot and on these mounts.
    """
    if not facts.made:
        return Verdict.MAKE
    if _contradict(facts) and not facts.adopt:
        return Verdict.REFUSE
    if facts.failed or not (facts.clean or facts.lived):
        return Verdict.DURABLE
    if facts.clean and facts.durable_fits and not (facts.alike or facts.adopt):
        return Verdict.DURABLE
    return Verdict.LIVE


def _contradict(facts: Facts) -> bool:
    """Whether nobody can tell which of the copies is right."""
    if facts.clean and facts.checksum:
        return not (facts.durable_fits or (facts.live_fits and not facts.failed))
    if facts.clean:
        return not facts.alike
    return facts.lived and not facts.failed and not facts.explained


class Trust(Enum):
    """What counts as written besides the blocks that the written map has; on pages with a wrong checksum all does."""

    NOTHING = "all that is local"
    UNEXPOSED = "what is local on exposed pages"
    MAP = "nothing"


def trust_in_marks(verdict: Verdict, facts: Facts, *, told: bool, switched: bool) -> Trust:
    """How far to believe the written map, once it is known which copy of the bitmap counts. The first row counts.

    ============================================================  =========
    what is known                                                 trust
    ============================================================  =========
    the state file is of a version without one: not *told*        NOTHING
    the cache was a plain target: *switched*                      NOTHING
    the operator vouches for the bitmap: *adopt*                  NOTHING
    a write-back has *failed*                                     NOTHING
    the files were closed                                         MAP
    they were used here: the live bitmap counts                   MAP
    they were used elsewhere: the durable one counts              UNEXPOSED
    ============================================================  =========
    """
    if not told or switched or facts.adopt or facts.failed:
        return Trust.NOTHING
    if facts.clean or verdict is Verdict.LIVE:
        return Trust.MAP
    return Trust.UNEXPOSED

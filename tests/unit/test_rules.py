"""Rules of --tls-authz: what a file may say, and whom its lines fit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xnbd.access.identity import NOBODY, Identity
from xnbd.access.rights import EVERYBODY, Access
from xnbd.access.rules import parse_rules, read_rules
from xnbd.errors import ConfigurationError
from xnbd.protocol.server_handshake import Denied, Export, export_flags

DISK = Export("disk", 1 << 20, export_flags(readonly=False), "a disk")


def verdict(text: str, *names: str, export: str = "disk") -> Optional[bool]:
    """Whether a client with these *names* may write to *export*; None if it may not open it."""
    return parse_rules(text.encode(), "rules").select(Identity(names)).writable(export)


def fits(pattern: str, *names: str) -> bool:
    return verdict(f'"{pattern}" disk rw', *names) is True


def fits_export(pattern: str, export: str) -> bool:
    return verdict(f'* "{pattern}" rw', "uid:1", export=export) is True


def refusal(text: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        parse_rules(text.encode("utf-8", "surrogateescape"), "/etc/rules")
    return str(refused.value)


# Files


def test_the_first_line_that_fits_decides() -> None:
    text = "uid:1 disk ro\nuid:* disk rw\nuid:1 * rw\n"
    assert verdict(text, "uid:1") is False
    assert verdict(text, "uid:2") is True
    assert verdict(text, "uid:1", export="other") is True
    assert verdict(text, "uid:2", export="other") is None


def test_any_of_a_clients_names_may_fit() -> None:
    text = "dns:b.example * ro\nCN=alice * rw"
    assert verdict(text, "CN=alice", "dns:a.example") is True
    assert verdict(text, "CN=alice", "dns:b.example") is False


def test_comments_blank_lines_tabs_and_line_ends_of_windows_are_no_rules() -> None:
    text = "\n# who may\n   \n\t# more\r\nuid:7\tdisk   rw  # the backup\r\n"
    assert verdict(text, "uid:7") is True
    assert len(parse_rules(text.encode(), "rules").lines) == 1
    assert parse_rules(b"", "rules").lines == parse_rules(b"#", "rules").lines == ()


def test_words_with_spaces_and_hashes_stand_in_quotes() -> None:
    text = '"CN=Alice Smith,O=Example Ltd" "my disk" rw\nCN=Bob\\ Smith \\#1 ro\nCN=Eve "#2" ro\nCN=a#b x#y ro'
    assert verdict(text, "CN=Alice Smith,O=Example Ltd", export="my disk") is True
    assert verdict(text, "CN=Bob Smith", export="#1") is False
    assert verdict(text, "CN=Eve", export="#2") is False
    assert verdict(text, "CN=a#b", export="x#y") is False


@pytest.mark.parametrize(
    "line, reason",
    [
        ("uid:1 disk", "expected IDENTITY EXPORT rw|ro, and there are 2 words"),
        ("uid:1 disk rw ro", "and there are 4 words"),
        ("uid:1 my disk rw", "and there are 4 words"),
        ("uid:1 disk RW", "'RW': expected rw or ro"),
        ("uid:1 disk r", "'r': expected rw or ro"),
        ('"uid:1 disk rw', "without its other half"),
        ('uid:1 "disk"x rw', "without its other half"),
        ("uid:1 disk rw\\", "without its other half"),
        ("alice disk rw", "'alice' is no identity: expected a subject like CN=alice,O=Example"),
        ("uid:root disk rw", "'uid:root': expected the number of a user"),
        ("uid: disk rw", "expected the number of a user"),
        ("cn=alice,O=x disk rw", "cn= never fits: write CN="),
        ("CN=alice,ou=x disk rw", "ou= never fits: write OU="),
        ("CN=a+st=x disk rw", "st= never fits: write ST="),
        ('"CN=alice, O=Example" disk rw', "' O=Example' is no part of a subject"),
        ("CN=alice,Example disk rw", "'Example' is no part of a subject"),
        ("CN=alice, disk rw", "'' is no part of a subject"),
        ("* \\C3 rw", "it is no UTF-8"),
        ("uid:1 d\x00 rw", "a character that cannot be printed: uid:1 d\\x00 rw"),
        ("uid:1\u2028d rw", "a character that cannot be printed"),
        ("\ufeffuid:1 d rw", "a character that cannot be printed"),
        ("uid:1 \udcff rw", "it is no UTF-8"),
    ],
)
def test_what_a_line_cannot_say_is_told_with_its_number(line: str, reason: str) -> None:
    message = refusal(f"# first\nuid:1 * ro\n{line}\nuid:2 * ro\n")
    assert message.startswith("/etc/rules:3: ")
    assert reason in message
    assert message.isprintable()


def test_rules_are_the_same_if_they_say_the_same() -> None:
    """A reload tells whether they have changed."""
    text = b'# who\nCN=a*,O=b "my disk" rw\n* \\* ro\n'
    assert parse_rules(text, "rules") == parse_rules(text.replace(b"# who", b""), "rules")
    assert parse_rules(text, "rules") != parse_rules(text.replace(b"rw", b"ro"), "rules")
    assert parse_rules(text, "rules") != parse_rules(text.replace(b"a*", b"a?"), "rules")


def test_what_is_no_file_of_rules_is_refused_in_a_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(5 << 20)
    (tmp_path / "empty").write_text("# nothing but a comment\n\n")
    for name, reason in (
        ("none", "the rules .*/none: it cannot be read: No such file"),
        (".", "no regular file|Is a directory"),
        ("fifo", "this is no regular file"),
        ("large", "more than 4194304 bytes"),
        ("empty", "empty: there is no rule, so nobody could open anything"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            read_rules(str(tmp_path / name))


# Whom a pattern fits


@pytest.mark.parametrize(
    "pattern, name",
    [
        ("CN=alice,O=Example", "CN=alice,O=Example"),
        ("CN=*,O=Example", "CN=alice,O=Example"),
        ("CN=al*e,O=*", "CN=alice,O=Example"),
        ("*,O=Example", "CN=alice,OU=a,O=Example"),
        ("*,O=Example", "O=Example"),
        ("CN=alice,*", "CN=alice"),
        ("CN=alice,*,C=DE", "CN=alice,OU=a,O=b,C=DE"),
        ("CN=?lice", "CN=alice"),
        (r"CN=Smith\, Alice", r"CN=Smith\, Alice"),
        (r"CN=Smith\, Alice", r"CN=Smith\2C Alice"),
        (r"CN=Smith\2c Alice", r"CN=Smith\, Alice"),
        ("CN=Smith*", r"CN=Smith\, Alice"),
        ("CN=Smith? Alice", r"CN=Smith\, Alice"),
        ("CN=Jürgen", r"CN=J\C3\BCrgen"),
        (r"CN=J\C3\BCrgen", "CN=Jürgen"),
        (r"CN=a\*b", r"CN=a*b"),
        (r"CN=\#1", r"CN=\#1"),
        ("CN=a+OU=b,O=c", "CN=a+OU=b,O=c"),
        ("CN=a+*,O=c", "CN=a+OU=b,O=c"),
        ("1.2.3.4=#0402*", "1.2.3.4=#04024869"),
        ("dns:*.example.com", "dns:a.example.com"),
        ("dns:A.Example", "dns:a.eXAMPLE"),
        ("uri:spiffe://x/*", "uri:spiffe://x/vm/1,2"),
        ("email:*@example.com", "email:a@example.com"),
        ("psk:*", "psk:alice"),
        (r"psk:a\\b", r"psk:a\b"),
        ("uid:100?", "uid:1004"),
        ("*", "CN=alice"),
        ("*", "uid:0"),
    ],
)
def test_a_pattern_fits(pattern: str, name: str) -> None:
    assert fits(pattern, name)


@pytest.mark.parametrize(
    "pattern, name",
    [
        ("CN=alice", "CN=Alice"),
        ("CN=alice", "CN=alice,O=Example"),
        ("CN=alice,O=Example", "CN=alice"),
        ("CN=alice,O=Example", "O=Example,CN=alice"),
        ("CN=alice*", "CN=alice,O=Example"),
        ("CN=alice?O=Example", "CN=alice,O=Example"),
        ("*=alice", "CN=bob,CN=alice"),
        ("CN=*", "CN=a+OU=b"),
        ("*,O=Example", "CN=alice+O=Example"),
        ("*+O=Example", "CN=alice,O=Example"),
        ("CN=alice", "dns:alice"),
        ("dns:a", "uri:a"),
        ("dns:*.example.com", "dns:example.com"),
        ("email:a@b", "email:A@b"),
        ("psk:alice", "psk:alice2"),
        ("uid:1", "uid:10"),
        ("uid:?", "uid:10"),
        ("*", ""),
    ],
)
def test_a_pattern_does_not_fit(pattern: str, name: str) -> None:
    assert not fits(pattern, name)


@pytest.mark.parametrize(
    "pattern, forged",
    [
        ("CN=alice,O=Example", r"CN=alice\,O=Example"),
        ("CN=*,O=Example", r"CN=mallory\,O=Example"),
        ("CN=*,O=Example", r"CN=mallory\,O=Example,O=Other"),
        ("*,O=Example", r"CN=mallory\,O=Example"),
        ("*,O=Example", r"CN=mallory\\\,O=Example"),
        ("CN=alice", "CN=alice\0.mallory"),
        ("CN=alice*", "CN=alice\0"),
        ("CN=alice*", r"CN=alice\00"),
        ("CN=alice*", r"CN=alice\0A"),
        ("CN=*", "CN=a\nb"),
        ("*,O=Example", "CN=a\n,O=Example"),
        ("dns:alice*", "dns:alice\0.mallory"),
        ("dns:alice*", "dns:alice\n"),
        ("psk:*", "psk:a\x1b[2J"),
        ("uri:*", "uri:\u202egpj"),
        ("CN=*", "CN=\udcff"),
        ("CN=*", r"CN=\FF"),
        ("*", "CN=a\\"),
        ("*", "CN=a\0"),
    ],
)
def test_odd_characters_forge_no_match(pattern: str, forged: str) -> None:
    assert not fits(pattern, forged)


def test_one_odd_name_does_not_take_the_others_away() -> None:
    assert fits("dns:a", "CN=\0", "dns:a")


def test_a_name_is_shown_in_one_line() -> None:
    assert str(Identity(("dns:a\n\x1b[2J",))) == r"dns:a\n\x1b[2J"
    assert Identity(("uri:\n",)).at("192.0.2.1:5") == r"192.0.2.1:5 as uri:\n"


def test_clients_without_a_name_fit_a_line_for_them_only() -> None:
    assert verdict("* * rw\nuid:* * rw\nCN=* * rw") is None
    assert verdict("* * rw\nanonymous * ro") is False
    assert verdict("anonymous * rw", "uid:0", "anonymous") is None


@pytest.mark.parametrize(
    "pattern, export, fitting",
    [
        ("disk", "disk", True),
        ("disk", "Disk", False),
        ("*", "", True),
        ("*", "any, thing\n", True),
        ("vm-*", "vm-", True),
        ("vm-?", "vm-", False),
        ("a*b*c", "axbxbxc", True),
        ("a*b*c", "axbxbx", False),
        (r"\*", "*", True),
        (r"\*", "x", False),
        (r"a\,b", "a,b", True),
        ("*.img", "x.img.bak", False),
    ],
)
def test_patterns_for_exports(pattern: str, export: str, fitting: bool) -> None:
    assert fits_export(pattern, export) is fitting


def test_a_long_name_takes_no_long_time() -> None:
    began = time.monotonic()
    assert not fits("CN=" + "*a" * 30 + "b", "CN=" + "a" * 8000)
    assert not fits("*,CN=x," * 20 + "O=y", "CN=x," * 400 + "O=z")
    assert time.monotonic() - began < 20


# Rights


def test_without_rules_everybody_may_do_everything() -> None:
    rights = EVERYBODY.rights_of(NOBODY)
    assert rights.may_open("disk")
    assert rights.offer(DISK) == DISK


def test_a_reader_is_offered_the_disk_as_read_only(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text("uid:1 disk ro\n")
    access = Access(read_rules(str(path)))
    offered = access.rights_of(Identity(("uid:1",))).offer(DISK)
    assert offered == DISK._replace(flags=export_flags(readonly=True))
    with pytest.raises(Denied, match=r"^export 'disk' is denied to uid:2$"):
        access.rights_of(Identity(("uid:2",))).offer(DISK)
    with pytest.raises(Denied, match=r"denied to anonymous$"):
        access.rights_of(NOBODY).offer(DISK)


# Anything

ODD = st.text(alphabet=st.sampled_from('CNO=,+\\"#*? \tauid:rw1\0\n\x7f\xe9'), max_size=40)


@given(st.lists(st.one_of(ODD, st.text(max_size=20)), max_size=5), ODD)
def test_any_file_is_rules_or_a_line_that_says_what_is_wrong(lines: List[str], name: str) -> None:
    text = "\n".join(lines)
    try:
        verdict(text, name, f"CN={name}", f"psk:{name}", export=name)
    except ConfigurationError as error:
        assert str(error).startswith("rules:")
    except UnicodeEncodeError:
        pass  # half of a pair of UTF-16, which is no file's


@given(st.binary(max_size=60))
def test_any_bytes_are_rules_or_a_line_that_says_what_is_wrong(data: bytes) -> None:
    try:
        parse_rules(data, "rules")
    except ConfigurationError as error:
        assert str(error).startswith("rules:")


def escaped(value: str) -> str:
    """A value as RFC 4514 writes it."""
    return "".join(f"\\{character}" if character in ',+"\\<>;=# ' else character for character in value)


VALUES = st.text(alphabet=st.sampled_from('ab,+"\\<>;=# *?O'), min_size=1, max_size=12)


@given(VALUES, VALUES)
def test_no_value_gets_out_of_its_part(value: str, other: str) -> None:
    name = f"CN={escaped(value)},O={escaped(other)}"
    assert fits("CN=*,O=*", name)
    assert not fits("CN=*", name)
    assert not fits("*,CN=*,O=*,O=*", name)
    assert fits(f"CN={escaped(value).replace('*', '%').replace('?', '%')}".replace("%", "?") + ",O=*", name)
    assert fits("CN=*,O=a", name) == (other == "a")

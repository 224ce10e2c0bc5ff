"""Addresses of origins: hosts and ports, and NBD URIs after their specification."""

from __future__ import annotations

import os
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xnbd.errors import ConfigurationError
from xnbd.origin.address import overrules, parse_origin, place_of
from xnbd.origin.nbd.address import NbdAddress
from xnbd.origin.nbd.encryption import Encryption


@pytest.mark.parametrize(
    ("uri", "host", "port", "name"),
    [
        ("nbd://example.com", "example.com", 10809, ""),
        ("nbd://example.com/", "example.com", 10809, ""),
        ("nbd://example.com:10809/export", "example.com", 10809, "export"),
        ("nbd://example.com:/export", "example.com", 10809, "export"),
        ("nbd://example.com:1/disk", "example.com", 1, "disk"),
        ("nbd://example.com//disk", "example.com", 10809, "/disk"),
        ("nbd://example.com/a/b", "example.com", 10809, "a/b"),
        ("nbd://example.com/hello%20world", "example.com", 10809, "hello world"),
        ("nbd://example.com/50%25+%23%3F", "example.com", 10809, "50%+#?"),
        ("nbd://example.com/%C3%A9", "example.com", 10809, "é"),
        ("nbd://example.com/%FF", "example.com", 10809, "\udcff"),
        ("nbd://192.0.2.1:99", "192.0.2.1", 99, ""),
        ("nbd://[::1]", "::1", 10809, ""),
        ("nbd://[2001:db8::1]:99/x", "2001:db8::1", 99, "x"),
        ("nbd://[fe80::1%25eth0]:99/x", "fe80::1%eth0", 99, "x"),
    ],
)
def test_uris_for_tcp(uri: str, host: str, port: int, name: str) -> None:
    assert parse_origin(uri) == NbdAddress(host, port, "", name)


@pytest.mark.parametrize(
    ("uri", "path", "name"),
    [
        ("nbd+unix:///?socket=/run/nbd.sock", "/run/nbd.sock", ""),
        ("nbd+unix:///export?socket=/run/nbd.sock", "/run/nbd.sock", "export"),
        ("nbd+unix:////export?socket=/run/nbd.sock", "/run/nbd.sock", "/export"),
        ("nbd+unix:///?socket=/a%20b%26c%3Dd+e", "/a b&c=d+e", ""),
        ("nbd+unix:///?socket=%00/abstract", "\0/abstract", ""),
        ("nbd+unix:///?socket=nbd.sock", os.path.abspath("nbd.sock"), ""),
    ],
)
def test_uris_for_unix_sockets(uri: str, path: str, name: str) -> None:
    assert parse_origin(uri) == NbdAddress("", 0, path, name)


@pytest.mark.parametrize(
    ("uri", "how"),
    [
        ("nbds://h:1/x", Encryption()),
        ("NBDS://h:1/x?tls-verify-peer=true", Encryption()),
        ("nbds://h:1/x?tls-certificates=/c%20c", Encryption(certificates="/c c")),
        ("nbds://h:1/x?tls-certificates=c", Encryption(certificates=os.path.abspath("c"))),
        ("nbds://h:1/x?tls-verify-peer=0", Encryption(verify_peer=False)),
        ("nbds://h:1/x?tls-verify-peer=FALSE&tls-hostname=o.example", Encryption("", "", "o.example", False)),
        ("nbds://alice@h:1/x?tls-psk-file=k", Encryption("alice", psk_file=os.path.abspath("k"))),
        ("nbds://a%40b@h:1/x?tls-psk-file=/k", Encryption("a@b", psk_file="/k")),
    ],
)
def test_uris_that_ask_for_tls(uri: str, how: Encryption) -> None:
    assert parse_origin(uri) == NbdAddress("h", 1, "", "x", how)
    assert parse_origin(str(parse_origin(uri))) == NbdAddress("h", 1, "", "x", how)


def test_uris_that_ask_for_tls_over_a_unix_socket() -> None:
    address = parse_origin("nbds+unix://alice@/x?tls-psk-file=/k&socket=s")
    assert address == NbdAddress("", 0, os.path.abspath("s"), "x", Encryption("alice", psk_file="/k"))
    assert str(address) == f"nbds+unix://alice@/x?socket={os.path.abspath('s')}&tls-psk-file=/k"


def test_the_place_of_a_disk_is_the_same_with_tls_and_without() -> None:
    place = parse_origin("nbd://h:1/x").place
    assert place == "nbd://h:1/x"
    assert parse_origin("nbds://alice@h:1/x?tls-psk-file=/k").place == place
    assert place_of("nbds://h:1/x?tls-certificates=/c") == place
    assert place_of("nbds://h:1/y") != place
    assert place_of("no address") == "no address"
    assert parse_origin("nbds+unix:///x?socket=/s&tls-certificates=/c").place == "nbd+unix:///x?socket=/s"


@pytest.mark.parametrize(
    ("wanted", "noted", "expected"),
    [
        ("nbds://h:1/x?tls-certificates=/new", "nbds://h:1/x?tls-certificates=/old", True),
        ("nbds://h:1/x", "nbd://h:1/x", True),
        ("nbd://h:1/x", "nbds://h:1/x", False),
        ("nbds://h:1/x", "nbds://other:1/x", False),
        ("nbds://h:1/x", "", False),
    ],
)
def test_a_command_line_says_anew_how_to_encrypt_but_not_to_stop_it(wanted: str, noted: str, expected: bool) -> None:
    assert overrules(wanted, noted) == expected


@pytest.mark.parametrize("host", ["origin.example", "192.0.2.7", "2001:db8::7"])
def test_a_host_and_a_port(host: str) -> None:
    assert parse_origin(host, "8520", "disk") == NbdAddress(host, 8520, "", "disk")
    assert parse_origin(host, "8520") == NbdAddress(host, 8520, "", "")


def test_brackets_around_a_host_are_allowed() -> None:
    assert parse_origin("[::1]", "8520") == NbdAddress("::1", 8520, "", "")


def test_the_export_may_be_named_beside_a_uri_that_names_none() -> None:
    assert parse_origin("nbd://h/", None, "disk") == NbdAddress("h", 10809, "", "disk")
    assert parse_origin("nbd://h/disk", None, "disk") == NbdAddress("h", 10809, "", "disk")


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("nbd://h/x?tls-certificates=/c", "tls-certificates needs TLS: write nbds in place of nbd"),
        ("nbd+unix:///x?socket=/s&tls-hostname=h", "tls-hostname needs TLS"),
        ("nbds://h/x?tls-type=psk", "parameter 'tls-type' is not known"),
        ("nbds://h/x?tls-certificates=/c&tls-psk-file=/k", "give tls-certificates or tls-psk-file"),
        ("nbds://h/x?tls-certificates=", "tls-certificates is no path"),
        ("nbds://h/x?tls-psk-file=%00", "tls-psk-file is no path"),
        ("nbds://h/x?tls-hostname=%00", "tls-hostname has a NUL"),
        ("nbds://h/x?tls-verify-peer=maybe", "tls-verify-peer is 'maybe': expected true or false"),
        ("nbds://h/x?tls-verify-peer=1&tls-verify-peer=0", "given twice"),
        ("nbds://alice@h/x", "only tls-psk-file has a use for it"),
        ("nbds://a:b@h/x?tls-psk-file=/k", "no user has a name with a colon"),
        ("nbds:///x", "expected nbds://host/name"),
        ("nbds+unix:///x", "expected nbds+unix:///name?socket=PATH"),
        ("nbds+unix:///x?socket=/s", "add tls-certificates=DIRECTORY, or tls-hostname=NAME"),
        ("nbds+unix://h/x?socket=/s&tls-certificates=/c", "with three slashes"),
        ("nbds+vsock://1/x", "begins with nbd:// or nbd+unix://"),
        ("nbd+vsock://1/x", "begins with nbd:// or nbd+unix://"),
        ("ftp://h/x", "begins with nbd:// or nbd+unix://"),
        ("://h/x", "begins with nbd:// or nbd+unix://"),
        ("nbd:///x", "expected nbd://host"),
        ("nbd://:99/x", "expected nbd://host"),
        ("nbd://::1/x", "expected nbd://host"),
        ("nbd://user@h/x", "leave out the user"),
        ("nbd://h:0/x", "port 0: expected a whole number from 1 to 65535"),
        ("nbd://h:65536/x", "expected a whole number from 1 to 65535"),
        ("nbd://[::1/x", "is no URI"),
        ("nbd://h/x?foo=1", "parameter 'foo' is not known"),
        ("nbd://h/x?socket=/s", "parameter 'socket' is not known"),
        ("nbd://h/x#y", "write # in a name as %23"),
        ("nbd://h/x#", "write # in a name as %23"),
        ("nbd://h/a b", "write special characters as %20"),
        ("nbd://h/a\nb", "write special characters as %20"),
        ("nbd://h/100%", "write special characters as %20"),
        ("nbd://h/%00", "no NUL"),
        ("nbd://h%00/", "no host has"),
        ("nbd://h/" + "x" * 4097, "at most 4096 bytes"),
        ("nbd+unix:///x", "expected nbd+unix:///name?socket=PATH"),
        ("nbd+unix:///x?socket=", "expected nbd+unix:///name?socket=PATH"),
        ("nbd+unix://x?socket=/s", "with three slashes"),
        ("nbd+unix:///?socket=/s&socket=/t", "given twice"),
        ("nbd+unix:///?socket=/a%00b", "no path has a NUL"),
        ("nbd+unix:///?socket=/" + "x" * 107, "at most 107 bytes"),
    ],
)
def test_uris_that_cannot_be_used_are_refused(origin: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        parse_origin(origin)
    assert message in str(failure.value)
    assert failure.value.exit_status == 2


@pytest.mark.parametrize(
    ("host", "port", "name", "message"),
    [
        ("h", None, None, "a port has to follow"),
        ("h", "http", None, "port http: expected a whole number"),
        ("h", "-1", None, "port -1: expected a whole number"),
        ("h", "²", None, "expected a whole number"),
        ("", "1", None, "expected a host"),
        ("a b", "1", None, "expected a host"),
        ("/run/nbd.sock", "1", None, "expected a host"),
        ("h", "1", "x\0", "no NUL"),
        ("nbd://h/x", "8520", None, "leave out the port 8520"),
        ("nbd://h/x", None, "y", "names another export than 'y'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    host: str, port: Optional[str], name: Optional[str], message: str
) -> None:
    with pytest.raises(ConfigurationError) as failure:
        parse_origin(host, port, name)
    assert message in str(failure.value)


NAMES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=50)
HOSTS = st.sampled_from(["h", "origin.example", "192.0.2.7", "2001:db8::7", "fe80::1%eth0"])


@given(HOSTS, st.integers(1, 65535), NAMES)
def test_an_address_written_as_a_uri_is_read_back_the_same(host: str, port: int, name: str) -> None:
    address = NbdAddress(host, port, "", name)
    assert parse_origin(str(address)) == address


@given(NAMES.map(lambda tail: os.path.normpath("/s" + tail.replace("/", "_")[:25])), NAMES)
def test_a_socket_written_as_a_uri_is_read_back_the_same(path: str, name: str) -> None:
    address = NbdAddress("", 0, path, name)
    assert parse_origin(str(address)) == address


def test_a_uri_for_people_reads_well() -> None:
    assert str(parse_origin("::1", "8520", "my/disk")) == "nbd://[::1]:8520/my/disk"
    assert str(parse_origin("nbd+unix:///disk?socket=/run/x.sock")) == "nbd+unix:///disk?socket=/run/x.sock"

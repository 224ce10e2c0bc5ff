"""What proves to a store or a web server who asks, from where its tools have it; never from an address.

What obstore finds by itself is left to it: the environment, the metadata of an instance, the key
files of Google, the command line of Azure. Added here are the profiles of AWS, and ``.netrc`` for the web.
"""

from __future__ import annotations

import configparser
import netrc
import os
from base64 import b64encode
from typing import Dict, List
from urllib.parse import urlsplit

from ..base import OriginLost

_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
"""Settings of a profile, and what obstore calls them."""

_INDIRECT = ("role_arn", "sso_session", "sso_start_url", "credential_process")


def credential_files(scheme: str) -> List[str]:
    """Files of this computer that are read for an address of this *scheme*, those that are there."""
    if scheme == "s3":
        paths = [_aws_file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), _aws_file("AWS_CONFIG_FILE", "config")]
    elif scheme == "gs":
        paths = [os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")]
    else:
        paths = [_netrc_file()] if scheme in ("http", "https") else []
    paths.append(os.environ.get("SSL_CERT_FILE", ""))
    return [path for path in paths if os.path.exists(path)]


def missing_files() -> List[str]:
    """Of the files that the environment names for AWS, what is told of those that are not there."""
    named = [(name, os.environ.get(name, "")) for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")]
    return [f"{name} is {path}, which is not there" for name, path in named if path and not os.path.exists(path)]


def check_authorities() -> None:
    """That the file of authorities can be read, if one is named: without it none counts. Raises `OriginLost`."""
    path = os.environ.get("SSL_CERT_FILE", "")
    if path and not os.access(path, os.R_OK):
        raise OriginLost(f"SSL_CERT_FILE is {path}, which cannot be read or is not there", refused=True)


def _aws_file(variable: str, name: str) -> str:
    return os.environ.get(variable) or os.path.expanduser(f"~/.aws/{name}")


def _netrc_file() -> str:
    return os.environ.get("NETRC") or os.path.expanduser("~/.netrc")


def web_headers(url: str) -> Dict[str, str]:
    """The header that says who asks the web server of *url*, if ``.netrc`` knows. Raises `OriginLost`."""
    path = _netrc_file()
    try:
        found = netrc.netrc(path).authenticators(urlsplit(url).hostname or "")
    except FileNotFoundError:
        return {}
    except (OSError, netrc.NetrcParseError) as error:
        raise OriginLost(f"{path} cannot be read: {_reason(error)}", refused=True) from error
    if found is None:
        return {}
    user, _, password = found
    return {"authorization": f"Basic {b64encode(f'{user}:{password or str()}'.encode()).decode()}"}


def aws_settings(profile: str) -> Dict[str, str]:
    """What the *profile* says (empty: the default one), in obstore's words.

    Keys in the environment go before a profile that is not named. Raises `OriginLost`.
    """
    name = profile or os.environ.get("AWS_PROFILE") or "default"
    found: Dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        found.update(_section(_aws_file(variable, file), section))
    if not found and name != "default":
        raise OriginLost(f"there is no profile {name} in ~/.aws", refused=True)
    in_environment = "AWS_ACCESS_KEY_ID" in os.environ and not profile
    if not in_environment and "aws_access_key_id" not in found and any(key in found for key in _INDIRECT):
        raise OriginLost(
            f"profile {name} has no keys, but a way to get some: put them into the environment "
            "(aws configure export-credentials)",
            refused=True,
        )
    return {ours: found[key] for key, ours in _KEYS.items() if key in found and not _overruled(key, in_environment)}


def _section(path: str, section: str) -> Dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, default_section="no section has this name")
    try:
        parser.read(path, encoding="utf-8")
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise OriginLost(f"{path} cannot be read: {_reason(error)}", refused=True) from error
    return dict(parser[section]) if parser.has_section(section) else {}


def _overruled(key: str, keys_in_environment: bool) -> bool:
    """Whether a variable of the environment goes before what a profile says."""
    if key == "region":
        return any(name in os.environ for name in ("AWS_REGION", "AWS_DEFAULT_REGION"))
    if key == "endpoint_url":
        return any(name in os.environ for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    return keys_in_environment


def _reason(error: Exception) -> str:
    """Without what the file says: a parser's message quotes its lines."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "a line of it makes no sense"

"""Settings of a store, looked at before obstore has them: some that make no sense end in a panic of it.

No message has a value in it: most of them are secrets.
"""

from __future__ import annotations

import os
import re
from typing import Any, List, Mapping, Optional, Sequence, Tuple
from urllib.parse import urlsplit

from ..base import OriginLost

_SECRETS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN"),
    "az": (
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_TOKEN",
        "AZURE_STORAGE_CLIENT_ID",
        "AZURE_STORAGE_CLIENT_SECRET",
        "AZURE_CLIENT_ID",
        "AZURE_CLIENT_SECRET",
        "AZURE_TENANT_ID",
    ),
}
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SERVERS_OF_CREDENTIALS = ("AWS_METADATA_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_ENDPOINT_URL_STS")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\U0010ffff\"<>\\^`{|}@]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_server_url(text: str) -> bool:
    """Whether *text* is a URL of a web server, perhaps with a path, and with nothing else."""
    try:
        parts = urlsplit(text)
        usable = parts.port is None or parts.port > 0
    except ValueError:
        return False
    usable = usable and parts.scheme in ("http", "https") and not parts.query and not parts.fragment
    return usable and bool(_HOST.fullmatch(parts.hostname or "")) and not _FORBIDDEN.search(text)


def check_settings(scheme: str, settings: Mapping[str, Any]) -> None:
    """Look at *settings*, in obstore's words, and at those of the environment that count. Raises `OriginLost`."""
    for name in _SECRETS.get(scheme, ()):
        _check_secret(name, os.environ.get(name, ""))
    for name in ("access_key_id", "secret_access_key", "session_token"):
        _check_secret(f"aws_{name} of the profile", settings.get(name, ""))
    if scheme != "s3":
        return
    for name, value in _that_count(ENDPOINTS, "endpoint_url", settings.get("endpoint")):
        if not is_server_url(value):
            raise OriginLost(f"{name} is no URL of a server, as in https://host:8080", refused=True)
    for name in _SERVERS_OF_CREDENTIALS:
        if name in os.environ and not is_server_url(os.environ[name].partition("?")[0]):
            raise OriginLost(f"{name} is no URL of a server", refused=True)
    for name, value in _that_count(_REGIONS, "region", settings.get("region")):
        if not _NAME.fullmatch(value):
            raise OriginLost(f"{name} is no name of a region, as in us-east-1", refused=True)


def _that_count(variables: Sequence[str], name: str, setting: Optional[str]) -> List[Tuple[str, str]]:
    """The *setting* with that *name* in the profile, or else those *variables* that there are; each with its name.

    A setting of the address has been looked at, and is right.
    """
    if setting is not None:
        return [(f"{name} of the profile", setting)]
    return [(variable, os.environ[variable]) for variable in variables if variable in os.environ]


def _check_secret(name: str, value: str) -> None:
    if _CONTROL.search(value):
        raise OriginLost(f"{name} has a line break or another control character in it: take that out", refused=True)

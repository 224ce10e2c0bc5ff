"""From an address to the store of obstore that has the object. Imported in a thread of the process that reads."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Dict

from ..base import OriginLost
from .address import ObjectAddress
from .credentials import aws_settings, check_authorities, web_headers
from .failures import refusal_of_settings
from .settings import ENDPOINTS, check_settings

CALL_TIME = 120
"""Seconds that one call of obstore takes at most, with all of its body."""

_ADVICE = "needs the package obstore: pip install 'xnbd[objects]'"


def open_store(address: ObjectAddress, connect_timeout: float) -> Any:
    """The store, which connects when it is asked for something.

    obstore makes one attempt at each call: the origin knows better when to try again. Raises `OriginLost`.
    """
    try:
        from obstore import store
    except ImportError as error:
        raise OriginLost(_ADVICE, refused=True) from error
    options = {
        "timeout": f"{CALL_TIME}s",
        "connect_timeout": f"{max(1, round(connect_timeout * 1000))}ms",
        "allow_http": False,
    }
    common = {"client_options": options, "retry_config": {"max_retries": 0, "retry_timeout": timedelta(0)}}
    opener = {"s3": _open_s3, "gs": _open_gs, "az": _open_az}.get(address.scheme, _open_web)
    try:
        opened = opener(store, address, common)
        if not options["allow_http"]:
            check_authorities()
        return opened
    except OriginLost:
        raise
    except Exception as error:  # whatever obstore does not like of its settings
        raise OriginLost(refusal_of_settings(error), refused=True) from error


def _open_web(store: Any, address: ObjectAddress, common: Dict[str, Any]) -> Any:
    url = f"{address.scheme}://{address.container}"
    common["client_options"]["allow_http"] = address.scheme == "http"
    headers = web_headers(url)
    if headers:
        common["client_options"]["default_headers"] = headers
    return store.HTTPStore.from_url(url, **common)


def _open_s3(store: Any, address: ObjectAddress, common: Dict[str, Any]) -> Any:
    settings: Dict[str, Any] = {}
    if address.parameter("anonymous"):
        settings["skip_signature"] = True
    else:
        settings.update(aws_settings(address.parameter("profile")))
    settings.update({name: address.parameter(name) for name in ("endpoint", "region") if address.parameter(name)})
    if address.parameter("virtual-host"):
        settings["virtual_hosted_style_request"] = True
    check_settings("s3", settings)
    endpoint = settings.get("endpoint") or next((os.environ[name] for name in ENDPOINTS if name in os.environ), "")
    common["client_options"]["allow_http"] = endpoint.startswith("http://")
    return store.S3Store(address.container, **settings, **common)


def _open_gs(store: Any, address: ObjectAddress, common: Dict[str, Any]) -> Any:
    settings: Dict[str, Any] = {}
    if address.parameter("anonymous"):
        settings["skip_signature"] = True
    if address.parameter("endpoint"):
        settings["base_url"] = address.parameter("endpoint")
        common["client_options"]["allow_http"] = address.parameter("endpoint").startswith("http://")
    return store.GCSStore(address.container, **settings, **common)


def _open_az(store: Any, address: ObjectAddress, common: Dict[str, Any]) -> Any:
    settings: Dict[str, Any] = {}
    if address.parameter("anonymous"):
        settings["skip_signature"] = True
    if address.parameter("account"):
        settings["account_name"] = address.parameter("account")
    check_settings("az", settings)
    if address.parameter("endpoint"):
        settings["endpoint"] = address.parameter("endpoint")
        common["client_options"]["allow_http"] = address.parameter("endpoint").startswith("http://")
    return store.AzureStore(address.container, **settings, **common)

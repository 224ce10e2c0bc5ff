"""A store that speaks S3, filled by a test."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from ceph import START, answers
from server_process import wait_until

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDXNBDTEST", "AWS_SECRET_ACCESS_KEY": "not-to-be-seen-at-all"}

CLIENT = """
import sys
from obstore import put
from obstore.store import S3Store
store = S3Store("golden", endpoint=sys.argv[1], region="us-east-1", client_options={"allow_http": True})
put(store, sys.argv[2], sys.stdin.buffer.read())
"""
"""In a process of its own: obstore starts threads, and pytest forks."""


class Store:
    """A store at *url* with a bucket ``golden``."""

    def __init__(self, url: str) -> None:
        self.url = url

    def put(self, key: str, content: bytes) -> None:
        subprocess.run([sys.executable, "-c", CLIENT, self.url, key], input=content, env=KEYS, check=True, timeout=60)

    def make_bucket(self) -> None:
        """Signed by curl, for obstore makes none."""
        user = ":".join(KEYS.values())
        wait_until(lambda: answers(self.url), "an answer", START)
        user, nothing = ":".join(KEYS.values()), hashlib.sha256().hexdigest()
        words = ["curl", "-sSf", "-X", "PUT", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", user]
        words += ["-H", f"x-amz-content-sha256: {nothing}", f"{self.url}/golden"]
        subprocess.run(words, check=True, timeout=60)

    def uri(self, key: str, *parameters: str) -> str:
        return "&".join([f"s3://golden/{key}?endpoint={self.url}", *parameters])

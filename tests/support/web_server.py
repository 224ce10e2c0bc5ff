"""nginx, which serves the files of a directory over HTTP and HTTPS."""

from __future__ import annotations

import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Dict

from server_process import free_port, wait_until

CONFIGURATION = """daemon off; master_process off; pid {where}/pid; error_log {where}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log {where}/access.log;
    client_body_temp_path {where}/body; proxy_temp_path {where}/proxy; fastcgi_temp_path {where}/fastcgi;
    uwsgi_temp_path {where}/uwsgi; scgi_temp_path {where}/scgi;
    sendfile on; keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{port}; listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {certificates}/server-cert.pem; ssl_certificate_key {certificates}/server-key.pem;
        root {root};
        location /moved/ {{ rewrite ^/moved(/.*) $1 redirect; }}
        location /unsafe/ {{ return 302 http://127.0.0.1:{port}/$request_filename; }}
        location /round/ {{ return 302 $request_uri; }}
        location /forbidden/ {{ return 403; }}
        location /slow/ {{ alias {root}/; limit_rate 200k; }}
        location /private/ {{ alias {root}/; auth_basic "who"; auth_basic_user_file {where}/users; }}
    }}
}}
"""

PASSWORD = "not-to-be-seen"


class WebServer:
    """A context in which nginx serves *root*; Alice has the `PASSWORD` for what is under ``/private/``."""

    def __init__(self, where: Path, root: Path, certificates: Path) -> None:
        self.port, self.tls_port = free_port(), free_port()
        self._where = where / "nginx"
        self._root, self._certificates = root, certificates

    def __enter__(self) -> WebServer:
        self._where.mkdir()
        (self._where / "users").write_text(f"alice:{{PLAIN}}{PASSWORD}\n")
        configuration = self._where / "nginx.conf"
        configuration.write_text(
            CONFIGURATION.format(
                where=self._where,
                port=self.port,
                tls_port=self.tls_port,
                root=self._root,
                certificates=self._certificates,
            )
        )
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with (self._where / "output").open("ab") as output:
            self._process = subprocess.Popen(
                ["nginx", "-c", str(self._where / "nginx.conf")], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        wait_until(self._listens, "nginx to listen")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def _listens(self) -> bool:
        assert self._process.poll() is None, (self._where / "output").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.tls_port), timeout=5):
            return True
        return False

    @property
    def env(self) -> Dict[str, str]:
        """By which a client believes its certificate."""
        return {"SSL_CERT_FILE": str(self._certificates / "ca-cert.pem")}

    def uri(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def tls_uri(self, path: str) -> str:
        return f"https://localhost:{self.tls_port}/{path}"

    def requests(self) -> int:
        """How many it has answered."""
        return len((self._where / "access.log").read_text().splitlines())

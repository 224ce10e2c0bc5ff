"""A real Prometheus that scrapes servers of a test, and what it answers."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

from server_process import ROOT, START_TIME, free_port, wait_until

CONTRIB = ROOT / "contrib" / "prometheus"


class Prometheus:
    """A Prometheus on *port*."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, what: str, **arguments: str) -> Any:
        with urllib.request.urlopen(f"{self._url}{what}?{urllib.parse.urlencode(arguments)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> Dict[str, float]:
        """By export; an expression without exports has one value, for the empty name."""
        found = self.ask("query", query=expression)["result"]
        return {sample["metric"].get("export", ""): float(sample["value"][1]) for sample in found}

    def targets(self) -> List[Dict[str, Any]]:
        return list(self.ask("targets")["activeTargets"])

    def is_ready(self) -> bool:
        try:
            return bool(self.ask("status/runtimeinfo"))
        except OSError:
            return False


@contextmanager
def prometheus(directory: Path, ports: Sequence[int]) -> Iterator[Prometheus]:
    """One that scrapes *ports* every second, with the rules of contrib."""
    port, config = free_port(), directory / "prometheus.yml"
    targets = ", ".join(f'"127.0.0.1:{target}"' for target in ports)
    text = (CONTRIB / "prometheus.yml").read_text().replace("15s", "1s").replace("xnbd.rules", f"{CONTRIB}/xnbd.rules")
    config.write_text(re.sub(r"targets: \[.*\]", f"targets: [{targets}]", text))
    with open(directory / "prometheus.log", "wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        running = Prometheus(port)
        wait_until(running.is_ready, "Prometheus", START_TIME)
        yield running
    finally:
        process.terminate()
        process.wait()

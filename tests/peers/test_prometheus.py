"""A real Prometheus scrapes servers and wrappers, and promtool runs the tests of contrib/prometheus."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from conftest import MIB, Start, StartWrapper
from prometheus_server import CONTRIB, prometheus
from proxies import Proxy, make_disk
from scraping import metrics_port, scrape
from server_process import ROOT, wait_until
from wrapper_process import Wrapper

SERVERS = int(os.environ.get("XNBD_PROMETHEUS_SERVERS", "3"))
EXPORTS = int(os.environ.get("XNBD_PROMETHEUS_EXPORTS", "200"))


def promtool(*arguments: object) -> str:
    result = subprocess.run(
        ["promtool", *map(str, arguments)], cwd=CONTRIB, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert not result.returncode, result.stdout.decode()
    return result.stdout.decode()


def test_the_rules_pass_their_tests() -> None:
    promtool("check", "config", "prometheus.yml")
    assert "SUCCESS" in promtool("test", "rules", "xnbd.rules.test.yml")


def test_every_alert_is_tested_and_told_of() -> None:
    alerts = re.findall(r"alert: (\w+)", (CONTRIB / "xnbd.rules.yml").read_text())
    tested = (CONTRIB / "xnbd.rules.test.yml").read_text()
    guide = (ROOT / "contrib" / "doc" / "operations.rst").read_text()
    assert len(alerts) > 6
    assert [alert for alert in alerts if f"alertname: {alert}" not in tested] == []
    assert [alert for alert in alerts if alert not in guide] == []


def with_exports(start_wrapper: StartWrapper, directory: Path, number: int) -> Wrapper:
    disk = directory / "many.img"
    disk.write_bytes(bytes(MIB))
    images = {f"export {i}": {"mode": "target", "image_path": str(disk)} for i in range(number)}
    database = directory / "many.db"
    database.write_text(json.dumps({"version": 2, "images": images}))
    wrapper = start_wrapper("--metrics", 0, database=database)
    wrapper.wait_for_log("INFO: metrics on ")
    return wrapper


def test_prometheus_scrapes_servers_and_a_wrapper(
    start: Start, start_wrapper: StartWrapper, tmp_path: Path, image: Path
) -> None:
    origin = start("--target", "--readonly", make_disk(tmp_path))
    proxy = Proxy(start, tmp_path, origin.uri, "--metrics", 0)
    servers = [start("--target", "--readonly", "--spare-workers", 1, "--metrics", 0, image) for _ in range(SERVERS)]
    for server in servers:
        server.wait_for_log("INFO: metrics on ")
    wrapper = with_exports(start_wrapper, tmp_path, EXPORTS)
    logs = [server.log() for server in (proxy.server, *servers)] + [wrapper.log()]
    ports = [metrics_port(log) for log in logs]
    with prometheus(tmp_path, ports) as running, wrapper.client("export 7") as client, proxy.raw() as reader:

        def scraped() -> bool:
            return [target["health"] for target in running.targets()] == ["up"] * len(ports)

        wait_until(scraped, "a scrape of all")
        client.read(0, 4096)
        reader.read(0, 4096)
        wait_until(lambda: running.value("sum(xnbd_requests_total)") == {"": 2.0}, "the requests")
        assert running.value("count(xnbd_disk_bytes)") == {"": EXPORTS + SERVERS + 1}
        assert running.value('xnbd_clients{export="export 7"}') == {"export 7": 1}
        quantile = running.value("histogram_quantile(0.99, sum by (le) (xnbd_request_duration_seconds_bucket))")
        assert 0 < quantile[""] < 10
        assert running.value('count(up{job="xnbd"} == 1)') == {"": len(ports)}
        for rule in running.ask("rules")["groups"][0]["rules"]:
            assert rule["health"] in ("ok", "unknown"), rule
        assert not [target["lastError"] for target in running.targets() if target["lastError"]]


def test_names_with_all_kinds_of_characters_are_scraped(start: Start, image: Path, tmp_path: Path) -> None:
    name = 'a "b" \\ {c="d"}, ä'
    server = start("--target", "--metrics", 0, "--exportname", name, image)
    server.wait_for_log("INFO: metrics on ")
    port = metrics_port(server.log())
    assert scrape(port)("xnbd_clients", export=name) == 0
    with prometheus(tmp_path, [port]) as running:
        wait_until(lambda: running.value("xnbd_clients") == {name: 0}, "the export's name")

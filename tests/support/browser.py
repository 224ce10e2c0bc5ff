"""Chromium without a window, steered through two pipes: messages of its debugging protocol, each with a zero behind."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

_PROGRAM = "chromium-headless-shell"
_PATIENCE = 60.0
_OPTIONS = (
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
)


class Browser:
    """The program, with its profile in *directory*. It looks nowhere but at this computer."""

    def __init__(self, directory: Path) -> None:
        commands, self._commands = map(_out_of_the_way, os.pipe())
        self._events, events = map(_out_of_the_way, os.pipe())
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [_PROGRAM, *_OPTIONS, *sandbox, f"--user-data-dir={directory}", "about:blank"]
        # It reads from 3 and writes to 4, whatever numbers the pipes have here.
        line = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{events}', "bash", *command]
        with (directory / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(line, pass_fds=(commands, events), stdin=subprocess.DEVNULL, stderr=stderr)
        os.close(commands)
        os.close(events)
        self._input = b""
        self._number = 0
        self._pages: Dict[str, Page] = {}

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A tab of that size, once the document is there."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.show(width, height, dark=dark)
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    def call(self, method: str, session: Optional[str] = None, **parameters: Any) -> Dict[str, Any]:
        """One command, and what it returns."""
        self._number += 1
        message: Dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])

    def _receive(self) -> Dict[str, Any]:
        """The next message; events go to their pages."""
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._input:
            assert select.select([self._events], [], [], max(0.0, until - time.monotonic()))[0], "the browser is silent"
            data = os.read(self._events, 1 << 20)
            assert data, "the browser has ended"
            self._input += data
        line, _, self._input = self._input.partition(b"\0")
        message: Dict[str, Any] = json.loads(line)
        if "method" in message and message.get("sessionId") in self._pages:
            self._pages[message["sessionId"]].note(message["method"], message["params"])
        return message

    def forget(self, session: str, target: str) -> None:
        self.call("Target.closeTarget", targetId=target)
        del self._pages[session]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._commands)
        os.close(self._events)


def _out_of_the_way(fd: int) -> int:
    """Another descriptor of the same, above those that the program has at fixed places."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    finally:
        os.close(fd)


class Page:
    """One tab: what is in it, what its console says, and where it has asked."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target
        self.complaints: List[str] = []
        """Errors and warnings of its console, and exceptions."""
        self.urls: List[str] = []

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.forget(self._session, self._target)

    def call(self, method: str, **parameters: Any) -> Dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def note(self, event: str, about: Dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(about["args"]))
        elif event == "Network.requestWillBeSent":
            self.urls.append(about["request"]["url"])

    def show(self, width: int, height: int, *, dark: bool) -> None:
        """In a window of that size."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        phone = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def evaluate(self, expression: str) -> Any:
        """The value of some JavaScript there."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, (expression, result)
        return result["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Until it is true; its value."""
        until = time.monotonic() + _PATIENCE
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < until, (expression, self.text(), self.complaints)
            time.sleep(0.02)
        return value

    def text(self, selector: str = "body") -> str:
        """What can be read there."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText"))

    def screenshot(self, path: Path) -> None:
        """All of the page, as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

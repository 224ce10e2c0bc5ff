"""A virtual machine: started, told what to do, and killed."""

from __future__ import annotations

import base64
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from .archive import find_program
from .errors import GuestError
from .packages import Packages
from .qmp import Qmp

HOST = "10.0.2.2"
"""This computer's loopback, seen from a guest."""

_GEOMETRY = "cyls=16383,heads=16,secs=63"
"""Without one, qemu looks for a partition table when it starts, also where a machine waits for its migration: a proxy
would keep a block that the running machine may still change."""

_BOOT_TIME = 150.0
_KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1"
_FASTER_BOOT = "nokaslr no_timer_check cryptomgr.notests mitigations=off random.trust_cpu=on"


class Result(NamedTuple):
    """How a script in a guest ended: exit status, and its output and error output in one."""

    status: int
    output: str


class Guest:
    """A guest with *memory* MiB that boots *initramfs*; use it with ``with``, so that it ends.

    *disks* are values of qemu's -drive; they become /dev/vda, /dev/vdb, ... *forwards*
    are TCP ports of this computer's 127.0.0.1 and where they lead in the guest. An
    *incoming* guest does not boot: it waits until another one migrates to that URI.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        packages: Packages,
        initramfs: Path,
        *,
        memory: int = 256,
        processors: int = 1,
        disks: Sequence[str] = (),
        forwards: Optional[Dict[int, int]] = None,
        incoming: str = "",
    ) -> None:
        self.name = name
        self.console_path = directory / f"{name}.console"
        self.qmp_path = directory / f"{name}.qmp"
        self._incoming = incoming
        self._commands, theirs = socket.socketpair()
        network = "user,id=net" + "".join(f",hostfwd=tcp:127.0.0.1:{a}-:{b}" for a, b in (forwards or {}).items())
        command = [str(find_program("qemu-system-x86_64")), "-name", name, "-nodefaults", "-no-user-config"]
        command += [
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "qemu64,+rdrand,+rdseed",
            "-m",
            str(memory),
            "-smp",
            str(processors),
        ]
        command += ["-display", "none", "-no-reboot", "-serial", f"file:{self.console_path}"]
        command += ["-kernel", str(packages.kernel), "-initrd", str(initramfs), "-append"]
        command += [f"{_KERNEL_OPTIONS} {_FASTER_BOOT}"]
        command += ["-netdev", network, "-device", "virtio-net-pci,netdev=net,romfile="]
        command += ["-chardev", f"socket,id=commands,fd={theirs.fileno()}", "-device", "virtio-serial-pci"]
        command += ["-device", "virtserialport,chardev=commands,name=commands"]
        command += ["-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        for i, disk in enumerate(disks):
            command += ["-drive", f"if=none,id=disk{i},{disk}", "-device", f"virtio-blk-pci,drive=disk{i},{_GEOMETRY}"]
        if incoming:
            command += ["-incoming", incoming]
        with theirs, open(directory / f"{name}.qemu", "wb") as self._messages:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._messages,
                stderr=self._messages,
                pass_fds=[theirs.fileno()],
            )

    def __enter__(self) -> Guest:
        try:
            if not self._incoming:
                self.run("true", timeout=_BOOT_TIME)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """The power fails: what the guest has not written to its disks is lost."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._commands.close()

    def run(self, script: str, *, timeout: float = 120.0, check: bool = True) -> Result:
        """Run a shell script in the guest; GuestError if it fails (unless *check* is false) or takes too long."""
        result = self._exchange(script, time.monotonic() + timeout)
        if check and result.status:
            raise GuestError(
                f"{self.name}: {script!r} has status {result.status}:\n{result.output}\n{self.last_words()}"
            )
        return result

    def output(self, script: str, *, timeout: float = 120.0) -> str:
        """What a script prints, which must succeed."""
        return self.run(script, timeout=timeout).output.strip()

    def qmp(self) -> Qmp:
        """A connection to qemu's control channel, as soon as there is one; qemu serves one at a time."""
        deadline = time.monotonic() + _BOOT_TIME
        while True:
            try:
                return Qmp(self.qmp_path)
            except GuestError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise GuestError(f"{error}\n{self.last_words()}") from error
                time.sleep(0.02)

    def console(self) -> str:
        """What the kernel, and who writes to /dev/console, has said."""
        return self.console_path.read_text(errors="replace") if self.console_path.exists() else ""

    def last_words(self) -> str:
        """The end of the console's and of qemu's own output, for error messages."""
        said: List[str] = self.console().splitlines()[-15:]
        return "\n".join([*said, Path(self._messages.name).read_text(errors="replace")]).rstrip()

    def _exchange(self, script: str, deadline: float) -> Result:
        try:
            self._commands.settimeout(max(0.01, deadline - time.monotonic()))
            self._commands.sendall(base64.b64encode(script.encode()) + b"\n")
            head = self._receive(deadline, until=b"\n")
            status, length = map(int, head.split())
            return Result(status, self._receive(deadline, length=length).decode(errors="replace"))
        except socket.timeout:
            what = f"does not finish {script!r}"
        except (ConnectionError, EOFError):
            what = f"has ended during {script!r}"
        raise GuestError(f"guest {self.name} {what}:\n{self.last_words()}")

    def _receive(self, deadline: float, *, until: bytes = b"", length: int = 0) -> bytes:
        """Up to and with the byte *until*, or *length* bytes."""
        data = bytearray()
        while not data.endswith(until) or not data if until else len(data) < length:
            self._commands.settimeout(max(0.01, deadline - time.monotonic()))
            part = self._commands.recv(1 if until else length - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

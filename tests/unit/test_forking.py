"""What a forked child and its parent do to each other: nothing."""

from __future__ import annotations

import pytest
from server_process import PYTHON, ROOT, run

PREAMBLE = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from xnbd.system.forking import fork, fork_with_pipe, let_signals_in, reset_signals

def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def is_blocked(number):
    return number in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


def output_of(script: str) -> str:
    """What a program of its own prints, which must end without complaint."""
    _, out, err = run(PYTHON, "-W", "error", "-c", PREAMBLE + script)
    assert err == ""
    return out


def test_the_status_of_a_child_is_what_its_function_returns() -> None:
    assert output_of("tell(exit_code(fork('child', lambda: 7)))") == "7\n"


def test_a_child_that_fails_does_not_go_on_in_its_parents_code() -> None:
    script = """
def fail():
    raise SystemExit(0)
try:
    pid = fork("child", fail)
except BaseException:
    tell("the child is here")
    raise
finally:
    tell("went on")
tell(exit_code(pid))
"""
    _, out, err = run(PYTHON, "-c", PREAMBLE + script)
    assert out == "went on\n1\n"
    assert "child failed\nTraceback" in err


def test_a_failure_to_tell_of_a_failure_ends_the_child_too() -> None:
    script = """
from xnbd.logs import log
def refuse(record):
    raise MemoryError
log.addFilter(refuse)
def fail():
    raise ValueError
tell(exit_code(fork("child", fail)))
"""
    assert output_of(script) == "1\n"


def test_a_signal_that_comes_before_the_child_has_handlers_finds_these() -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: tell("the parent's handler", os.getpid() == parent))
parent = os.getpid()
def live():
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: tell("the child's handler"))
    let_signals_in()
    return 0
tell(exit_code(fork("child", live)))
"""
    assert output_of(script) == "the child's handler\n0\n"


def test_a_child_without_handlers_is_ended_by_what_came_before_and_wakes_nobody() -> None:
    script = """
wake, wake_writer = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(wake_writer)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: tell("the parent's handler"))
def live():
    os.kill(os.getpid(), signal.SIGTERM)
    reset_signals(signal.SIGTERM)
    return 0
tell(exit_code(fork("child", live)))
try:
    tell(os.read(wake, 1))
except BlockingIOError:
    tell("nothing")
"""
    assert output_of(script) == "-15\nnothing\n"


def test_the_parent_blocks_afterwards_what_it_blocked_before() -> None:
    script = """
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
exit_code(fork("child", lambda: 0))
tell(is_blocked(signal.SIGHUP), is_blocked(signal.SIGTERM))
"""
    assert output_of(script) == "True False\n"


def test_without_another_process_the_parent_has_its_signals_and_descriptors_back() -> None:
    script = """
import resource
if os.getuid() == 0:
    os.setresuid(64321, 64321, 64321)  # root's number of processes is not limited
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
before = os.listdir("/proc/self/fd")
try:
    fork_with_pipe("child", lambda writing: 0)
except BlockingIOError as error:
    tell(error.strerror)
tell(is_blocked(signal.SIGTERM), os.listdir("/proc/self/fd") == before)
"""
    assert output_of(script) == "Resource temporarily unavailable\nFalse True\n"


def test_a_pipe_tells_what_its_child_says_and_breaks_with_it() -> None:
    script = """
pid, reading = fork_with_pipe("child", lambda writing: os.write(writing, b"word"))
tell(os.read(reading, 10), os.read(reading, 10), exit_code(pid))
"""
    assert output_of(script) == "b'word' b'' 4\n"


def test_a_child_notices_that_nobody_reads_its_pipe_any_more() -> None:
    script = """
def live(writing):
    while True:
        os.write(writing, b"word")  # the reading end is the parent's alone
pid, reading = fork_with_pipe("child", live)
os.close(reading)
tell(exit_code(pid))
"""
    _, out, err = run(PYTHON, "-c", PREAMBLE + script)
    assert out == "1\n"
    assert "BrokenPipeError" in err


# What a steward forks


@pytest.mark.parametrize("ending", ["return 'result'", "raise TaskFailed('reason')"])
def test_a_child_that_outlives_its_steward_keeps_its_result_to_itself(ending: str) -> None:
    script = f"""
from xnbd.errors import TaskFailed
from xnbd.server.steward.child import Child
wait, go = os.pipe()
def work():
    os.read(wait, 1)
    {ending}
child = Child(lambda: os.close(go), work)
os.close(child.fileno())
os.close(go)
tell(exit_code(child.pid))
"""
    assert output_of(script) == ("0\n" if "return" in ending else "1\n")


def test_a_child_that_fails_before_its_work_is_a_failure_told_by_the_log() -> None:
    script = """
from xnbd.server.steward.child import Child
def fail():
    raise ValueError("cannot let go")
child = Child(fail, lambda: tell("working"))
child.wait()
tell(child.status, repr(child.message))
"""
    _, out, err = run(PYTHON, "-c", PREAMBLE + script)
    assert out == "1 ''\n"
    assert "a child of the steward failed\nTraceback" in err

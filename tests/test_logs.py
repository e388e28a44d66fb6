"""The log: its formats, and a standard error that takes nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest

from snitun_sync import logs
from snitun_sync.logs import KEPT_BYTES, PIECE_BYTES, StderrHandler
from snitun_sync.net.loop import Loop
from tests.services import RawRelay
from tests.support import PROJECT, Credentials, Program, module, wait_until

LINE = "x" * 99
LEFT_OUT = re.compile(rb"left out (\d+) lines: standard error took nothing for a while\n")


class Pipe:
    """A pipe, its handler, and all that was read from it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.size = fcntl.fcntl(self.writer, 1031, 4 * PIECE_BYTES)  # F_SETPIPE_SZ
        self.handler = StderrHandler(self.writer)
        self.read = b""
        self.lines = 0

    def log(self, text: str = LINE) -> None:
        """Log a line with its number."""
        self.lines += 1
        fields = {"msg": f"{self.lines:06} {text}", "levelno": 20}
        self.handler.handle(logging.makeLogRecord(fields))

    def drain(self) -> None:
        """Read what is in the pipe."""
        os.set_blocking(self.reader, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reader, 65536):
                self.read += data

    def close(self) -> None:
        """Close both ends."""
        for fd in (self.reader, self.writer):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_lines_that_are_taken_are_written_at_once(pipe: Pipe) -> None:
    pipe.log("naïve \udcff")
    pipe.drain()
    assert pipe.read == "000001 naïve \\udcff\n".encode()
    assert not pipe.handler._kept


def test_a_pipe_that_nobody_reads_blocks_nothing(pipe: Pipe) -> None:
    """All lines come out in order, but for those whose number is said."""
    while not pipe.handler._left_out:
        pipe.log()
    for _ in range(500):
        pipe.log()
    left_out = pipe.handler._left_out
    assert left_out == 501
    assert KEPT_BYTES - 200 < len(pipe.handler._kept) <= KEPT_BYTES
    while not LEFT_OUT.search(pipe.read):
        pipe.drain()
        pipe.handler._retry()
    pipe.drain()
    found = LEFT_OUT.search(pipe.read)
    assert found
    assert int(found[1]) == left_out
    pipe.log("the end")
    pipe.drain()
    numbers = [int(line[:6]) for line in LEFT_OUT.sub(b"", pipe.read).splitlines()]
    assert numbers == [*range(1, pipe.lines - left_out), pipe.lines]
    # The note stands where the lines are missing.
    assert pipe.read.endswith(found[0] + b"%06d the end\n" % pipe.lines)


def test_one_line_that_is_too_long_is_said_to_be_left_out(pipe: Pipe) -> None:
    pipe.log("y" * KEPT_BYTES)
    pipe.log("after")
    pipe.drain()
    assert LEFT_OUT.fullmatch(pipe.read.partition(b"000002")[0])
    assert pipe.read.endswith(b"000002 after\n")


def test_a_long_line_goes_in_pieces(pipe: Pipe) -> None:
    """Longer than the pipe: what it doesn't take waits, and nothing is lost."""
    text = "".join(f"{number:07}," for number in range(8 * PIECE_BYTES // 8))
    pipe.log(text)
    assert pipe.handler._kept
    while pipe.handler._kept:
        pipe.drain()
        pipe.handler._retry()
    pipe.drain()
    assert pipe.read.decode() == f"000001 {text}\n"


def test_a_timer_of_the_loop_writes_what_was_kept(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "RETRY_S", 0.01)
    loop = Loop()

    def run() -> None:
        pipe.handler.attach(loop.call_later)
        while not pipe.handler._kept:
            pipe.log()
        assert loop.timer_count == 1
        loop.run()
        pipe.handler.detach()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: pipe.handler._kept)
    last = b"%06d" % pipe.lines

    def is_out() -> bool:
        pipe.drain()
        return last in pipe.read

    wait_until(is_out)
    wait_until(lambda: loop.timer_count == 0)
    loop.stop()
    thread.join(10)
    assert not thread.is_alive()
    loop.close()


def test_after_detach_there_is_no_timer(pipe: Pipe) -> None:
    loop = Loop()
    pipe.handler.attach(loop.call_later)
    while not pipe.handler._kept:
        pipe.log()
    assert loop.timer_count == 1
    pipe.handler.detach()
    assert loop.timer_count == 0
    pipe.log()
    assert loop.timer_count == 0
    # What was kept before there was a loop gets its timer with it.
    pipe.handler.attach(loop.call_later)
    assert loop.timer_count == 1
    # Another thread makes none: only the loop's may.
    pipe.handler.detach()
    pipe.handler._call_later = loop.call_later
    other = threading.Thread(target=pipe.log)
    other.start()
    other.join()
    assert loop.timer_count == 0
    loop.close()


def test_the_end_waits_for_a_reader_but_not_for_ever(pipe: Pipe) -> None:
    while len(pipe.handler._kept) < PIECE_BYTES:
        pipe.log()

    def read() -> None:
        while b"last" not in pipe.read:
            pipe.read += os.read(pipe.reader, 4096)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    pipe.handler.say_last("last")
    reader.join(10)
    assert pipe.read.endswith(b"\nlast\n")
    # Nobody reads: it returns all the same, with nothing kept for another wait.
    while len(pipe.handler._kept) < PIECE_BYTES:
        pipe.log()
    pipe.handler.flush()
    assert not pipe.handler._kept


def test_a_closed_or_broken_standard_error_raises_nothing() -> None:
    pipe = Pipe()
    os.close(pipe.reader)
    pipe.log()  # EPIPE
    os.close(pipe.writer)
    pipe.log()  # EBADF
    assert not pipe.handler._kept
    none = StderrHandler(-1)
    none.handle(logging.makeLogRecord({"msg": "x"}))
    none.flush()
    assert not none._kept


def test_a_descriptor_that_is_non_blocking_already(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    while len(pipe.handler._kept) < PIECE_BYTES:
        pipe.log()
    while pipe.handler._kept:
        pipe.drain()
        pipe.handler._retry()
    pipe.drain()
    assert [int(line[:6]) for line in pipe.read.splitlines()] == [*range(1, pipe.lines + 1)]


def test_a_regular_file_takes_all() -> None:
    with tempfile.TemporaryFile() as file:
        handler = StderrHandler(file.fileno())
        handler.handle(logging.makeLogRecord({"msg": "z" * 100_000}))
        assert not handler._kept
        assert file.seek(0, os.SEEK_END) == 100_001


# --- in programs --------------------------------------------------------------------------


def logged(code: str, *, under_journald: bool = False) -> list[str]:
    """Return the lines that a program with this code logs."""
    python = [sys.executable, "-c", f"import logging; from snitun_sync.logs import *; {code}"]
    shell = 'JOURNAL_STREAM=$(stat -Lc %d:%i /dev/fd/2) exec "$@"' if under_journald else '"$@"'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *python], capture_output=True, text=True, cwd=PROJECT, check=True
    )
    return done.stderr.splitlines()


def test_the_text_format() -> None:
    lines = logged("set_up_logging('info'); log.info('a %d', 1); log.debug('b'); say_last('c')")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO a 1", lines[0])
    assert lines[1:] == ["c"]


FAILURE = """
set_up_logging('debug', {!r})
log.debug('a')
log.info('b')
log.warning('c')
try:
    1 / 0
except ZeroDivisionError:
    log.exception('d "\\x01"')
say_last('e')
"""


def test_priorities_under_journald() -> None:
    lines = logged(f"exec({FAILURE.format('text')!r})", under_journald=True)
    assert lines[:4] == ["<7>a", "<6>b", "<4>c", '<3>d "\x01"']
    assert "<3>Traceback (most recent call last):" in lines
    assert lines[-1] == "<3>e"
    assert all(line.startswith("<3>") for line in lines[3:])


@pytest.mark.parametrize("under_journald", [True, False])
def test_json(under_journald: bool) -> None:
    before = time.time()
    lines = logged(f"exec({FAILURE.format('json')!r})", under_journald=under_journald)
    objects = [json.loads(line) for line in lines]
    assert [fields["level"] for fields in objects] == ["debug", "info", "warning", "error", "error"]
    assert objects[3]["message"].startswith('d "\x01"\nTraceback (most recent call last):\n')
    assert objects[4]["message"] == "e"
    for fields in objects:
        assert sorted(fields) == ["level", "message", "time"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields["time"])
    assert objects[0]["time"][:10] >= time.strftime("%Y-%m-%d", time.gmtime(before))


def test_a_journal_stream_that_isn_t_ours_says_nothing() -> None:
    code = "import os; os.environ['JOURNAL_STREAM'] = '8:1'; set_up_logging('info'); log.info('a')"
    assert logged(code)[0].endswith(" INFO a")


def test_a_secret_is_masked_in_every_format(credentials: Credentials) -> None:
    for log_format in ("text", "json"):
        lines = logged(f"set_up_logging('info', {log_format!r}); log.info({credentials.token!r})")
        assert len(lines) == 1
        assert "[secret]" in lines[0]
        assert credentials.token[:20] not in lines[0]


WRAPPED = """
set_up_logging('info', {!r})
try:
    raise ValueError('a {} b' + chr(10) + 'c {{' + 'd' * 30)
except ValueError:
    log.exception('e')
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_secret_in_a_traceback_is_masked(credentials: Credentials, log_format: str) -> None:
    """Line by line: the rest of it is there."""
    lines = logged(f"exec({WRAPPED.format(log_format, credentials.token)!r})")
    text = "\n".join(lines)
    if log_format == "json":
        text = json.loads(text)["message"]
    assert "Traceback (most recent call last):\n" in text
    assert text.endswith("ValueError: a [secret] b\nc [secret]")
    assert credentials.token[:20] not in text


def test_a_client_whose_log_nobody_reads_goes_on(credentials: Credentials) -> None:
    """Its standard error is full from the start; the tunnel comes up, and SIGTERM ends it."""
    with RawRelay(credentials) as raw_relay:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"." * PIECE_BYTES)
        os.set_blocking(writer, True)
        command = module("snitun_sync.client", "--token-file", credentials.ticket_file)
        process = subprocess.Popen(
            [*map(str, command), "--log-level", "debug"],
            stderr=writer,
            cwd=PROJECT,
        )
        os.close(writer)
        try:
            with raw_relay.tunnel():
                data = b""
                while b"ready: " not in data:  # the timer has brought it out
                    data = data[-100:] + os.read(reader, 4096)
                process.terminate()
                assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(reader)


def test_a_program_whose_log_is_never_read_ends(credentials: Credentials) -> None:
    with RawRelay(credentials) as raw_relay:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"." * PIECE_BYTES)
        os.set_blocking(writer, True)
        command = module("snitun_sync.client", "--token-file", credentials.ticket_file, "--once")
        with subprocess.Popen(list(map(str, command)), stderr=writer, cwd=PROJECT) as process:
            os.close(writer)
            raw_relay.tunnel().sock.close()
            assert process.wait(20) == 69
        os.close(reader)


def test_the_last_line_is_json_too(credentials: Credentials) -> None:
    with Program(
        *module("snitun_sync.client", "--token-file", credentials.ticket_file, "--once"),
        *("--server", "127.0.0.1:1", "--log-format", "json"),
    ) as program:
        assert program.wait() == 69
    fields = json.loads(program.output.splitlines()[-1])
    assert fields["level"] == "error"
    assert fields["message"].startswith("snitun-client: can't reach the relay 127.0.0.1:1")


def test_standard_error_may_be_closed(credentials: Credentials) -> None:
    """Its number may be a socket's then: nothing is written there."""
    with RawRelay(credentials) as raw_relay:
        command = module("snitun_sync.client", "--token-file", credentials.ticket_file, "--once")
        shell = ["sh", "-c", '"$@" 2>&-', "sh", *map(str, command)]
        with subprocess.Popen(shell, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
            raw_relay.tunnel().sock.close()
            assert process.wait(20) == 69
            assert process.stdout
            assert process.stdout.read() == ""

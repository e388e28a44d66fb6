"""The log: lines on standard error that hold no secret and that nobody has to wait for.

Under journald a line carries its priority instead of a time stamp (sd-daemon(3)).
"""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .net.loop import Timer

    CallLater = Callable[[float, Callable[[], object]], Timer]

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
PERIOD_S = 10.0
WARNINGS_PER_PERIOD = 20  # of a kind
# A pipe that poll(2) calls writable takes this much without blocking (PIPE_BUF, pipe(7)).
PIECE_BYTES = 4096
# What waits for standard error. Once it is full, lines are left out until half of it has gone.
KEPT_BYTES = 256 * 1024
RETRY_S = 0.5
# How long a program that ends waits for its last lines to go.
LAST_S = 0.5
_PRIORITIES = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6}  # syslog(3); any other is 7
# Tokens, tickets as a line or as JSON, Fernet keys and keys in hex, logins of URLs, wherever
# they stand by mistake; not what is part of a path.
_SECRET = re.compile(
    r"(?<![\w/-])(?:(?:gA|st1\.)[\w=-]{20,}|[\w-]{43}=|[0-9a-fA-F]{64}(?![\w-]))|(?s:\{.{20,})"
    r"|(?<=://)[^\s:@/]*:\S+(?=@)"
)

log = logging.getLogger("snitun_sync")
_handler: StderrHandler | None = None  # this process's, once there is one


def masked(text: str) -> str:
    """Return `text` without anything that looks like a token, a ticket or a key."""
    return _SECRET.sub("[secret]", text)


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Log to standard error, in one of LOG_FORMATS; once for a process."""
    global _handler  # noqa: PLW0603
    # Where Python found it closed, some socket may have its number by now.
    _handler = StderrHandler(-1 if sys.stderr is None else sys.stderr.fileno())
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    if log_format == "json":
        formatter = _JsonFormatter()
    elif _is_journald():
        formatter = _JournalFormatter()
    _handler.setFormatter(formatter)
    _handler.addFilter(LogFilter())
    root = logging.getLogger()
    root.addHandler(_handler)
    root.setLevel(level.upper())
    # No line says which code or thread it comes from: a tenth of its cost (see "Optimization"
    # in Python's Logging HOWTO).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def stderr_handler() -> StderrHandler | None:
    """Return what writes this process's log; None before `set_up_logging`."""
    return _handler


def say_last(text: str) -> None:
    """Write a line that a program ends with, behind all that it has logged."""
    if _handler is not None:
        _handler.say_last(text)
    elif sys.stderr is not None:
        print(text, file=sys.stderr)


def _is_journald() -> bool:
    """Tell whether standard error leads to the journal.

    The variable alone doesn't say so: whoever was started by a service may have another
    standard error (systemd.exec(5), "$JOURNAL_STREAM").
    """
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


class StderrHandler(logging.Handler):
    """Writes to standard error what it takes at once, and keeps the rest for later.

    Later is the next line, or a timer of the loop. The descriptor stays as it is:
    other processes share it, and wouldn't expect O_NONBLOCK. Where it is closed or
    broken, lines are lost without a word.
    """

    def __init__(self, fd: int) -> None:
        """Write to the descriptor `fd`, which stays the caller's; nothing where it is below 0."""
        super().__init__()
        self._held = self.lock or threading.RLock()  # by `logging`, too, while it calls `emit`
        self._fd = fd
        self._poll = select.poll()
        if fd >= 0:
            self._poll.register(fd, select.POLLOUT)
        self._kept = bytearray()
        self._left_out = 0  # lines; while it isn't 0 all others are left out, too
        self._call_later: CallLater | None = None
        self._timer: Timer | None = None
        self._ident = 0

    # --- the loop ------------------------------------------------------------------

    def attach(self, call_later: CallLater) -> None:
        """Write what is kept by timers from now on; `call_later(delay_s, callback)` makes one.

        For the loop's thread, on which all timers and all calls of `call_later` are. What
        other threads log waits for the next line where it isn't taken at once.
        """
        with self._held:
            self._call_later, self._ident = call_later, threading.get_ident()
            self._write_later()

    def detach(self) -> None:
        """The loop has ended, or is about to: no timers any more."""
        with self._held:
            self._call_later = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    # --- lines ---------------------------------------------------------------------

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or keep it; for `logging`, which holds the lock."""
        self._add(self.format(record))

    def say_last(self, text: str) -> None:
        """Write the line that a program ends with: a bare one, where others have time stamps."""
        if type(self.formatter) is not logging.Formatter:
            text = self._formatted("ERROR", text)
        with self._held:
            self._add(text)
        self.flush()

    def flush(self) -> None:
        """Wait, LAST_S at most, until what is kept has gone; the rest is lost. For the end."""
        deadline = time.monotonic() + LAST_S
        with self._held:
            while self._kept and (left_s := deadline - time.monotonic()) > 0:
                if self._poll.poll(left_s * 1000):
                    self._write()
            self._kept.clear()

    # --- inside, under the lock --------------------------------------------------------

    def _add(self, line: str) -> None:
        if self._fd < 0:
            return
        if self._kept or self._left_out:
            self._write()
        data = (line + "\n").encode("utf-8", "backslashreplace")
        if self._left_out or len(self._kept) + len(data) > KEPT_BYTES:
            self._left_out += 1
        else:
            self._kept += data
            self._write()
        self._write_later()

    def _write(self) -> None:
        """Write while standard error takes something."""
        kept = self._kept
        while True:
            if self._left_out and len(kept) <= KEPT_BYTES // 2:
                kept += self._note()
            if not kept or not self._poll.poll(0):
                return
            try:
                del kept[: os.write(self._fd, kept[:PIECE_BYTES])]
            except BlockingIOError:
                return  # somebody has made it O_NONBLOCK, and poll(2) was too hopeful
            except OSError:
                kept.clear()  # closed, or broken: there is nobody to tell
                return

    def _note(self) -> bytes:
        text = f"left out {self._left_out} lines: standard error took nothing for a while"
        self._left_out = 0
        return self._formatted("WARNING", text).encode() + b"\n"

    def _formatted(self, level: str, text: str) -> str:
        return self.format(logging.makeLogRecord({"levelname": level, "msg": text}))

    def _write_later(self) -> None:
        is_loop = threading.get_ident() == self._ident
        if self._kept and is_loop and self._call_later is not None and self._timer is None:
            self._timer = self._call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        with self._held:
            self._timer = None
            self._write()
            self._write_later()


class _JournalFormatter(logging.Formatter):
    """Lines with their priority in front, each of a traceback's, too: sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        start = f"<{_PRIORITIES.get(record.levelname, 7)}>"
        return start + super().format(record).replace("\n", f"\n{start}")


class _JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level and message, a traceback in the latter."""

    def format(self, record: logging.LogRecord) -> str:
        import json  # noqa: PLC0415

        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        when = f"{second}.{int(record.created * 1000) % 1000:03}Z"
        level, message = record.levelname.lower(), super().format(record)
        return json.dumps({"time": when, "level": level, "message": message})


class LogFilter(logging.Filter):
    """Masks secrets; lets a limited number of warnings of a kind through in a period.

    What strangers can cause thousands of times shall not fill an appliance's SD card.
    Warnings are of a kind when their format is the same; how many were left out is
    said before the next one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._period_over = 0.0
        self._counts: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the line is to be written."""
        kind = str(record.msg)
        record.msg, record.args = masked(record.getMessage()), ()
        if record.exc_info:  # by line: what looks like a secret shall not hide the rest
            lines = logging.Formatter().formatException(record.exc_info).split("\n")
            record.exc_text = "\n".join(map(masked, lines))
        if record.levelno < logging.WARNING:
            return True
        now = time.monotonic()
        if now >= self._period_over:
            self._period_over = now + PERIOD_S
            counts, self._counts = self._counts, {}
            for left_out, count in counts.items():
                if count > WARNINGS_PER_PERIOD:
                    count -= WARNINGS_PER_PERIOD
                    log.warning("left out %d lines like: %s", count, left_out)
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        return count <= WARNINGS_PER_PERIOD

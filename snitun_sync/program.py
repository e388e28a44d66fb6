"""What the three programs have in common: exit codes, options, secrets, the log.

Exit codes are those of sysexits.h; a program that was stopped by a signal ends with 0.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import re
import signal
import sys
import time

from . import __version__
from .errors import (
    AuthenticationError,
    ConfigurationError,
    LinkError,
    ListenError,
    RefusedError,
    SniTunError,
    UnreadableError,
    UsageError,
)
from .protocol.aes import BACKENDS
from .protocol.names import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from .net.service import Service

EXIT_OK = 0
EXIT_USAGE = 64
EXIT_UNREADABLE = 66
EXIT_UNAVAILABLE = 69
EXIT_SOFTWARE = 70
EXIT_IO = 74
EXIT_REFUSED = 77
EXIT_CONFIGURATION = 78

_EXIT_CODES: tuple[tuple[type[SniTunError], int], ...] = (
    (UnreadableError, EXIT_UNREADABLE),
    (UsageError, EXIT_USAGE),
    (ConfigurationError, EXIT_CONFIGURATION),
    (RefusedError, EXIT_REFUSED),
    (AuthenticationError, EXIT_REFUSED),
    (LinkError, EXIT_UNAVAILABLE),
    (ListenError, EXIT_UNAVAILABLE),
)

LOG_LEVELS = ("debug", "info", "warning", "error")
CRYPTO_ENVIRONMENT = "SNITUN_CRYPTO"
MAX_SECRET_BYTES = 65536
PERIOD_S = 10.0
WARNINGS_PER_PERIOD = 20  # of a kind
SHORTEST_SECRET = 16
# Objects allocated before the collector looks for cycles among the young ones: connections
# come and go and leave none.
COLLECT_AFTER = 10_000
# Tokens, tickets as a line or as JSON, Fernet keys and keys in hex, wherever they stand by
# mistake; not what is part of a path.
_SECRET = re.compile(
    r"(?<![\w/-])(?:(?:gA|st1\.)[\w=-]{20,}|[\w-]{43}=|[0-9a-fA-F]{64}(?![\w-]))|(?s:\{.{20,})"
)

log = logging.getLogger("snitun_sync")


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of sysexits.h, and without secrets in its messages."""

    def __init__(self, prog: str, *, description: str, epilog: str = "", **options: Any) -> None:
        """`options` are what argparse passes on to the parser of a sub-command."""
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=_help,
            allow_abbrev=False,
            **options,
        )
        if not epilog:
            return  # a sub-command
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {masked(message)}; see {self.prog} --help\n")

    def add_network(self) -> None:
        """Add the options of programs that have tunnels."""
        self.add_argument(
            "--congestion-control",
            metavar="NAME",
            default="",
            help="how the kernel paces what is sent, such as bbr: small exchanges wait less behind "
            "large ones on a slow line (default: the system's)",
        )

    def add_common(self) -> None:
        """Add the options that all programs have."""
        self.add_argument(
            "--crypto",
            metavar="PACKAGE",
            help="pycryptodome (default) or cryptography; also $SNITUN_CRYPTO",
        )
        self.add_argument(
            "--log-level",
            default="info",
            choices=LOG_LEVELS,
            metavar="LEVEL",
            help=f"{', '.join(LOG_LEVELS)} (default: info); debug has a line for each connection",
        )


def _help(prog: str) -> argparse.HelpFormatter:
    """Format for the terminal's width; argparse would import shutil (0.7 MiB) to learn it."""
    try:
        columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size().columns or 80
    except (OSError, ValueError):
        columns = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=columns - 2)


def masked(text: str) -> str:
    """Return `text` without anything that looks like a token, a ticket or a key."""
    return _SECRET.sub("[secret]", text)


def crypto(option: str | None) -> str:
    """Return the crypto package asked for: by the option, else by the environment, else ""."""
    if option is not None:
        if option not in BACKENDS:
            raise UsageError(f"--crypto: {shown(option)}; expected {' or '.join(BACKENDS)}")
        return option
    return os.environ.get(CRYPTO_ENVIRONMENT, "")


def set_up_logging(level: str) -> None:
    """Log to standard error; journald brings time stamps of its own."""
    under_journald = "JOURNAL_STREAM" in os.environ
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(message)s" if under_journald else "%(asctime)s %(levelname)s %(message)s",
    )
    # No line says which code or thread it comes from: a tenth of its cost (see "Optimization"
    # in Python's Logging HOWTO).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for handler in logging.getLogger().handlers:
        handler.addFilter(LogFilter())


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


def read_text(path: str, option: str) -> str:
    """Return the text of the file that `option` names; "-" is standard input.

    Raises UnreadableError. A secret that others may read is worth a warning.
    """
    try:
        if path == "-":
            if sys.stdin is None:
                raise UnreadableError(f"{option}: standard input is closed")
            data = sys.stdin.buffer.read(MAX_SECRET_BYTES + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(MAX_SECRET_BYTES + 1)
                mode = os.fstat(file.fileno()).st_mode
            if mode & 0o004:
                log.warning("%s: %s can be read by everybody: chmod 600 it", option, path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UnreadableError(f"{option}: can't read {path}: {reason}") from None
    name = "standard input" if path == "-" else path
    if len(data) > MAX_SECRET_BYTES:
        raise UnreadableError(f"{option}: {name} has more than {MAX_SECRET_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UnreadableError(f"{option}: {name} is no text (UTF-8)") from None


def read_fernet_keys(path: str, option: str) -> list[str]:
    """Return the Fernet keys of a file, one a line. Raises ConfigurationError."""
    from .protocol.token import check_fernet_keys  # noqa: PLC0415  the client needs no hashlib

    lines = (line.partition("#")[0].strip() for line in read_text(path, option).split("\n"))
    keys = [line for line in lines if line]
    try:
        check_fernet_keys(keys)
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {path}: {error}") from None
    return keys


def take_environment(name: str) -> str | None:
    """Return the environment variable `name`, which holds a secret, and remove it."""
    value = os.environ.pop(name, None)
    if value:
        _overwrite(value, 50, 51)
    return value


def hide_argument(value: str) -> None:
    """Overwrite `value` on this process's command line, as others see it in ps; best effort."""
    _overwrite(value, 48, 49)


def _overwrite(secret: str, start_field: int, end_field: int) -> None:
    """Overwrite `secret` in the memory between two addresses from /proc/self/stat (proc(5)).

    Fields 48 and 49 bound the command line, 50 and 51 the first environment. What is
    too short to be a secret stays: it would be found in other words as well.
    """
    if len(secret) < SHORTEST_SECRET:
        return
    try:
        import ctypes  # noqa: PLC0415

        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # The second field may hold spaces; it ends with the last parenthesis.
            fields = file.read().rpartition(")")[2].split()
        start, end = int(fields[start_field - 3]), int(fields[end_field - 3])
        if not 0 < start < end:
            return
        area = (ctypes.c_char * (end - start)).from_address(start).raw
        wanted = os.fsencode(secret)
        at = area.find(wanted)
        while at >= 0:
            ctypes.memset(start + at, ord("x"), len(wanted))
            at = area.find(wanted, at + len(wanted))
    except (ImportError, OSError, ValueError, IndexError):
        pass  # not Linux, or /proc is hidden


def run_service(make: Callable[[], Service]) -> None:
    """Make a service and run it until it ends, or until SIGTERM or SIGINT stop it well.

    Raises the SniTunError that ended it.
    """
    service = make()
    # What is there now stays: the collector need never look at it again.
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)

    def stop(number: int, frame: object) -> None:
        service.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    _raise_descriptor_limit()
    service.run()


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as the system does: each connection takes one."""
    import resource  # noqa: PLC0415

    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass


def main(program: str, body: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Call `body(arguments)`; return the exit code, after one line for an error."""
    try:
        body(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except SniTunError as error:
        print(f"{program}: {masked(str(error))}", file=sys.stderr)
        return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_SOFTWARE)
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # what is printed can't be written
        # Don't complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return EXIT_OK  # who read it has seen enough
        print(f"{program}: standard output: {error.strerror or error}", file=sys.stderr)
        return EXIT_IO
    return EXIT_OK

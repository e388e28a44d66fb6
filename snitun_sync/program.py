"""What the three programs have in common: exit codes, options, secrets, the log.

Exit codes are those of sysexits.h; a program that was stopped by a signal ends with 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys

from . import __version__
from .errors import (
    AuthenticationError,
    ConfigurationError,
    LinkError,
    ListenError,
    RefusedError,
    SniTunError,
    UnreadableError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from .net.service import Service

EXIT_OK = 0
EXIT_USAGE = 64
EXIT_UNREADABLE = 66
EXIT_UNAVAILABLE = 69
EXIT_SOFTWARE = 70
EXIT_REFUSED = 77
EXIT_CONFIGURATION = 78

_EXIT_CODES: tuple[tuple[type[SniTunError], int], ...] = (
    (UnreadableError, EXIT_UNREADABLE),
    (ConfigurationError, EXIT_CONFIGURATION),
    (RefusedError, EXIT_REFUSED),
    (AuthenticationError, EXIT_REFUSED),
    (LinkError, EXIT_UNAVAILABLE),
    (ListenError, EXIT_UNAVAILABLE),
)

LOG_LEVELS = ("debug", "info", "warning", "error")
CRYPTO_ENVIRONMENT = "SNITUN_CRYPTO"
MAX_SECRET_BYTES = 65536
# Tokens and tickets, wherever they stand by mistake.
_SECRET = re.compile(r"(gA|st1\.)[A-Za-z0-9_=-]{20,}|\{.{20,}|[A-Za-z0-9_=-]{43,}")

log = logging.getLogger("snitun_sync")


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of sysexits.h, and without secrets in its messages."""

    def __init__(self, prog: str, *, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if not epilog:
            return  # a sub-command
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {masked(message)}; see {self.prog} --help\n")

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


def masked(text: str) -> str:
    """Return `text` without anything that looks like a token, a ticket or a key."""
    return _SECRET.sub("[secret]", text)


def crypto(option: str | None) -> str:
    """Return the crypto package asked for: by the option, else by the environment, else ""."""
    return option if option is not None else os.environ.get(CRYPTO_ENVIRONMENT, "")


def set_up_logging(level: str) -> None:
    """Log to standard error; journald brings time stamps of its own."""
    under_journald = "JOURNAL_STREAM" in os.environ
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(message)s" if under_journald else "%(asctime)s %(levelname)s %(message)s",
    )


def read_text(path: str, option: str) -> str:
    """Return the text of the file that `option` names; "-" is standard input.

    Raises UnreadableError. A secret that others may read is worth a warning.
    """
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_SECRET_BYTES + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(MAX_SECRET_BYTES + 1)
                mode = os.fstat(file.fileno()).st_mode
            if mode & 0o004:
                log.warning("%s: %s can be read by everybody: chmod 600 it", option, path)
    except OSError as error:
        raise UnreadableError(f"{option}: can't read {path}: {error.strerror or error}") from None
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

    Fields 48 and 49 bound the command line, 50 and 51 the first environment.
    """
    try:
        import ctypes  # noqa: PLC0415

        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # The second field may hold spaces; it ends with the last parenthesis.
            fields = file.read().rpartition(")")[2].split()
        start, end = int(fields[start_field - 3]), int(fields[end_field - 3])
        if not 0 < start < end:
            return
        area = (ctypes.c_char * (end - start)).from_address(start)
        wanted = os.fsencode(secret)
        at = area.raw.find(wanted)
        while at >= 0:
            ctypes.memset(start + at, ord("x"), len(wanted))
            at = area.raw.find(wanted)
    except (ImportError, OSError, ValueError, IndexError):
        pass  # not Linux, or /proc is hidden


def run_service(make: Callable[[], Service]) -> None:
    """Make a service and run it until it ends, or until SIGTERM or SIGINT stop it well.

    Raises the SniTunError that ended it.
    """
    service = make()

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
    except SniTunError as error:
        print(f"{program}: {masked(str(error))}", file=sys.stderr)
        return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_SOFTWARE)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read our output is gone; don't complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    return EXIT_OK

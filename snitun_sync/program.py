"""What the three programs have in common: exit codes, secrets, a service's life.

Exit codes are those of sysexits.h; a program that was stopped by a signal ends with 0.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from functools import cache, partial
from stat import S_ISREG

from .errors import (
    AuthenticationError,
    ConfigurationError,
    DeniedError,
    LinkError,
    ListenError,
    MasterError,
    NotReadyError,
    RefusedError,
    SniTunError,
    StoreError,
    UnreadableError,
    UsageError,
)
from .logs import masked, say_last, stderr_handler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .net.service import Service
    from .options import Options

EXIT_OK = 0
EXIT_NOT_READY = 1
EXIT_USAGE = 64
EXIT_UNREADABLE = 66
EXIT_UNAVAILABLE = 69
EXIT_SOFTWARE = 70
EXIT_IO = 74
EXIT_REFUSED = 77
EXIT_CONFIGURATION = 78

# The first that fits.
_EXIT_CODES = (
    (UnreadableError, EXIT_UNREADABLE),
    (UsageError, EXIT_USAGE),
    (ConfigurationError, EXIT_CONFIGURATION),
    ((RefusedError, AuthenticationError, DeniedError), EXIT_REFUSED),
    (NotReadyError, EXIT_NOT_READY),
    (StoreError, EXIT_IO),
    ((LinkError, ListenError, MasterError), EXIT_UNAVAILABLE),
)

MAX_SECRET_BYTES = 65536
MAX_CERTIFICATES_BYTES = 1024 * 1024  # those of all known authorities are 300 KiB
SHORTEST_SECRET = 16
STATUS_CHARACTERS = 512  # a message of 4096 bytes or more is ignored by systemd
# Objects allocated before the collector looks for cycles among the young ones: connections
# come and go and leave none.
COLLECT_AFTER = 10_000

log = logging.getLogger("snitun_sync")


def read_bytes(
    path: str, option: str, *, is_secret: bool = True, limit_bytes: int = MAX_SECRET_BYTES
) -> bytes:
    """Return what is in the file that `option` names; "-" is standard input.

    What came from there is kept, for when settings are read again. Raises UnreadableError, also
    for more than `limit_bytes`. A secret that others may read is worth a warning.
    """
    try:
        if path == "-":
            if sys.stdin is None:
                raise UnreadableError(f"{option}: standard input is closed")
            data = _standard_input(option)
        else:
            with open(path, "rb") as file:
                data = file.read(limit_bytes + 1)
                mode = os.fstat(file.fileno()).st_mode
            if is_secret and mode & 0o004:
                log.warning("%s: %s can be read by everybody: chmod 600 it", option, path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UnreadableError(f"{option}: can't read {path}: {reason}") from None
    if len(data) > limit_bytes:
        raise UnreadableError(f"{option}: {_name(path)} has more than {limit_bytes} bytes")
    return data


def read_text(path: str, option: str, *, is_secret: bool = True) -> str:
    """Return the text of a file, as `read_bytes` does; it is to be UTF-8."""
    try:
        return read_bytes(path, option, is_secret=is_secret).decode()
    except UnicodeDecodeError:
        raise UnreadableError(f"{option}: {_name(path)} is no text (UTF-8)") from None


def _name(path: str) -> str:
    return "standard input" if path == "-" else path


@cache
def _standard_input(option: str) -> bytes:
    """Return what comes from there: all to the option that reads it first, nothing to others."""
    return sys.stdin.buffer.read(MAX_SECRET_BYTES + 1)


def read_secret(path: str | None, option: str) -> str:
    """Return the secret in the file that `option` names, "" if it names none.

    Raises UnreadableError, and ConfigurationError where nothing is in it.
    """
    text = "" if path is None else read_text(path, option).strip()
    if path is not None and not text:
        raise ConfigurationError(f"{option}: {path} is empty")
    return text


def check_certificates(path: str, option: str) -> None:
    """See whether the file that `option` names, if any, has certificates, whole ones: to trust.

    It is read by whoever uses them, too. Only OpenSSL knows all that they may have wrong, and
    would stay in memory.
    """
    if not path:
        return
    if path == "-":
        raise UsageError(f"{option}: standard input; expected a file, to be read again")
    data = read_bytes(path, option, is_secret=False, limit_bytes=MAX_CERTIFICATES_BYTES)
    blocks = data.split(b"-----BEGIN CERTIFICATE-----")[1:]
    if not blocks:
        raise ConfigurationError(f"{option}: {path} has no certificates (PEM)")
    for number, block in enumerate(blocks, 1):
        if not _is_whole(block.partition(b"-----END CERTIFICATE-----")[0]):
            said = f"certificate {number} of {len(blocks)} in {path} is malformed"
            raise ConfigurationError(f"{option}: {said}; expected PEM, whole")


def _is_whole(block: bytes) -> bool:
    """Tell whether that is one value of DER in base64: X.690, 8.1, a sequence with its size."""
    import binascii  # noqa: PLC0415  few have such files

    try:
        value = binascii.a2b_base64(block)
        kind, octets = value[0], value[1] & 0x7F  # those of the size, which isn't below 128
    except (ValueError, IndexError):
        return False
    start = 2 + octets
    return kind == 0x30 and len(value) - start == int.from_bytes(value[2:start], "big")


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


def file_stamp(path: str) -> object:
    """Return what is another thing as soon as a file has changed; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns


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


def run_service(
    make: Callable[[], Service],
    options: Options,
    reload: Callable[[Service], Options],
    at_start: str,
) -> None:
    """Make a service and run it until it ends, or until SIGTERM or SIGINT stop it well.

    Open channels get the time of `options.grace` then; a second signal stops it at once. SIGHUP
    calls `reload(service)` on the service's thread, which returns the options that count
    from now on or raises ConfigurationError; those that `at_start` names don't, which is
    logged. SIGUSR1 logs how it goes. Raises the SniTunError that ended it.
    """
    service, first = make(), options
    if "NOTIFY_SOCKET" in os.environ:
        service.notify_manager(os.environ)
    # What is there now stays: the collector need never look at it again.
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)

    def stop(number: int, frame: object) -> None:
        service.stop(options.grace)

    def read_again() -> None:
        nonlocal options
        options = reload(service)
        log.root.setLevel(options.log_level.upper())
        for name in options.changed(first, at_start):
            log.warning("%s has changed: that takes a restart", name)

    def say_status() -> None:
        from .status_command import table  # noqa: PLC0415  few ask

        for line in table(service.report()):
            log.info("%s", line)

    def soon(call: Callable[[], None]) -> Callable[[int, object], None]:
        return lambda number, frame: service.loop.call_soon_threadsafe(call)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, soon(partial(service.reload, read_again)))
    signal.signal(signal.SIGUSR1, soon(say_status))
    _raise_descriptor_limit()
    handler = stderr_handler()
    if handler is not None:
        handler.attach(service.loop.call_later)
    try:
        service.run()
    finally:
        if handler is not None:
            handler.detach()
            handler.flush()


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as the system does: each connection takes one."""
    import resource  # noqa: PLC0415

    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass


def _tell_manager(name: str, text: str) -> None:
    """Leave what the program ends with to `systemctl status`, by sd_notify(3); best effort.

    While systemd waits for the next start it shows no line of the log that came before.
    """
    import socket  # noqa: PLC0415  not all programs have it

    address = "\0" + name[1:] if name[0] == "@" else name
    state = f"STATUS={' '.join(text.splitlines())[:STATUS_CHARACTERS]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(errors="replace"), address)
    except (OSError, ValueError):
        pass


class _OutputError(Exception):
    """Standard output doesn't take what is printed."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror or error}")
        self.is_closed = isinstance(error, BrokenPipeError)


def say(text: str, *, is_secret: bool = False) -> None:
    """Print `text` at once; where standard output doesn't take it, that ends the program.

    A secret that goes into a file that others may read is worth a warning.
    """
    try:
        mode = os.fstat(sys.stdout.fileno()).st_mode if is_secret and sys.stdout else 0
        if S_ISREG(mode) and mode & 0o004:
            log.warning("standard output: its file can be read by everybody: chmod 600 it")
        print(text, flush=True)
    except OSError as error:
        # Don't complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise _OutputError(error) from None


def main(program: str, body: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Call `body(arguments)`; return the exit code, after one line for an error."""
    manager = os.environ.get("NOTIFY_SOCKET", "")  # a service takes it out
    try:
        body(arguments)
    except (SniTunError, OSError) as error:
        text = masked(str(error))
        say_last(f"{program}: {text}")
        if manager:
            _tell_manager(manager, text)
        return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_SOFTWARE)
    except KeyboardInterrupt:
        return 130
    except _OutputError as error:
        if error.is_closed:
            return EXIT_OK  # who read it has seen enough
        say_last(f"{program}: {error}")
        return EXIT_IO
    return EXIT_OK

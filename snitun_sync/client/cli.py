"""`python -m snitun_sync.client`: options, the ticket from wherever it comes, and `show-ticket`."""

from __future__ import annotations

import logging
import sys
import time

from ..errors import ConfigurationError, TicketError, UsageError
from ..net.tuning import CLIENT_BUDGET_BYTES
from ..options import COMMAND_LINE, SOURCES, Parser, check_service
from ..program import main, read_text, run_service
from ..protocol.aes import load
from ..protocol.cipher import CIPHERS, IV_SIZE, KEY_SIZE
from ..protocol.names import is_time, parse_address
from ..protocol.ticket import LINE_PREFIX, RELAY_PORT, TOKEN_PREFIX, Ticket, is_token
from .client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..options import Options

PROGRAM = "snitun-client"
TOKEN_ENVIRONMENT = "SNITUN_TOKEN"

DESCRIPTION = """\
Keeps a tunnel to a relay, and brings what devices send there to a local service.
TLS runs from the device to that service: the relay sees no plaintext."""

EPILOG = f"""\
{PROGRAM} show-ticket tells what is in a ticket, without its secrets; it has a --help, too.

{SOURCES}

A ticket is what `snitun-master ticket` prints: a JSON object, or a line that starts
with `{LINE_PREFIX}`. Every option takes either form. Give it by one of
  --token-file FILE       the best way: nobody else can read a file with mode 600
  --token -               from standard input
  ${TOKEN_ENVIRONMENT}           removed from the environment at once
  --token TICKET          others may see it in ps for a moment
A bare Fernet token does as well, together with --server, --aes-key-file and
--aes-iv-file (hex), and --protocol-version and --cipher where they aren't 0 and aes-cbc.

exit codes (sysexits.h):
   0  stopped by SIGTERM or SIGINT, or --check found nothing wrong
  64  an option is wrong
  66  a file can't be read
  69  the relay can't be reached or the tunnel was lost (only with --once),
      or a ticket for a single connection is used up
  70  a defect of this program, or of the relay's
  77  the relay refused the token or the key (only with --once)
  78  the ticket or a setting is wrong

Without --once it tries again after every error of the network, for ever."""

SHOW_DESCRIPTION = """\
Prints what may be shown of a ticket: neither its token nor its key. Two tickets with the
same fingerprint have the same token."""


def parser() -> Parser:
    """Return the client's options."""
    options = Parser(PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    options.add_argument(
        "--endpoint",
        metavar="HOST:PORT",
        default="127.0.0.1:443",
        help="the local service: HOST:PORT, [IPV6]:PORT or unix:/PATH (default: 127.0.0.1:443)",
    )
    options.add_argument(
        "--once", action="store_true", help="make one attempt, and exit with its reason"
    )
    _add_ticket(options)
    options.add_network()
    options.add_common()
    return options


def show_parser() -> Parser:
    """Return the options of `show-ticket`."""
    options = Parser(f"{PROGRAM} show-ticket", description=SHOW_DESCRIPTION)
    options.add_argument("--json", action="store_true", help="print JSON; times in Unix seconds")
    _add_ticket(options)
    options.add_common()
    return options


def _add_ticket(options: Parser) -> None:
    """Add the options that give a ticket."""
    options.add_argument(
        "--token", metavar="TICKET", is_secret=True, help="the ticket itself, or -"
    )
    options.add_argument("--token-file", metavar="FILE", help="a file with the ticket, or -")
    options.add_argument(
        "--server", metavar="HOST[:PORT]", help="the relay, instead of the ticket's (port: 443)"
    )
    bare = options.add_argument_group("with a bare Fernet token")
    bare.add_argument("--aes-key-file", metavar="FILE", help="32 bytes in hex")
    bare.add_argument("--aes-iv-file", metavar="FILE", help="16 bytes in hex")
    bare.add_argument("--protocol-version", metavar="N", type=int, choices=(0, 1, 2))
    bare.add_argument("--cipher", choices=CIPHERS, metavar="NAME", help=", ".join(CIPHERS))


def find_ticket(options: Options) -> Ticket:
    """Return the ticket that the options give. Raises ConfigurationError."""
    ranks = options.rank("token"), options.rank("token_file")
    if options.token is not None and ranks[0] == ranks[1]:
        raise UsageError("--token: --token-file is there, too; expected one of them, found both")
    if options.token_file is not None and ranks[1] < ranks[0]:
        source = options.source("token_file")
        text = read_text(options.token_file, source)
    elif options.token == "-":
        text, source = read_text("-", options.source("token")), f"{options.source('token')} -"
    elif options.token is not None:
        text, source = options.token, options.source("token")
        if ranks[0] == COMMAND_LINE:
            logging.getLogger("snitun_sync").warning(
                "--token on the command line can be seen in ps and in the shell's history: "
                "better --token-file FILE, --token - or $%s",
                TOKEN_ENVIRONMENT,
            )
    else:
        raise UsageError(
            f"no ticket: expected --token-file FILE, --token - or ${TOKEN_ENVIRONMENT}"
        )
    text = text.strip()
    if is_token(text):
        return _bare(text, options)
    for name in ("aes_key_file", "aes_iv_file", "protocol_version", "cipher"):
        if getattr(options, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}: only with a bare Fernet token; a ticket has its own"
            )
    try:
        return Ticket.parse(text)
    except TicketError as error:
        hint = ""
        if source == options.source("token") and ("/" in text or "." in text) and len(text) < 256:
            if not text.startswith(LINE_PREFIX):
                hint = "; for a file there is --token-file"
        elif text.startswith(TOKEN_PREFIX):
            hint = "; a Fernet token's length is a multiple of 4: was it cut short?"
        raise TicketError(f"{source}: {error}{hint}") from None


def _bare(token: str, options: Options) -> Ticket:
    values = {}
    for name in ("server", "aes_key_file", "aes_iv_file"):
        values[name] = getattr(options, name)
        if values[name] is None:
            raise UsageError(
                f"a bare Fernet token needs --{name.replace('_', '-')} as well; a ticket has it all"
            )
    parse_address(values["server"], "--server", default_port=RELAY_PORT)
    return Ticket(
        server=values["server"],
        token=token,
        aes_key=_hex_file(values["aes_key_file"], options.source("aes_key_file"), KEY_SIZE),
        aes_iv=_hex_file(values["aes_iv_file"], options.source("aes_iv_file"), IV_SIZE),
        protocol_version=options.protocol_version or 0,
        cipher=options.cipher or "aes-cbc",
    )


def _hex_file(path: str, option: str, size: int) -> bytes:
    try:
        data = bytes.fromhex(read_text(path, option).strip())
    except ValueError:
        raise ConfigurationError(f"{option}: {path} is not a hex string") from None
    if len(data) != size:
        raise ConfigurationError(f"{option}: {path} has {len(data)} bytes in hex, expected {size}")
    return data


def show_ticket(ticket: Ticket, crypto: str) -> dict[str, str | float | None]:
    """Return what may be shown of a ticket; times are UTC, Unix seconds."""
    return {
        "server": ticket.server,
        "hostname": ticket.hostname or None,
        "valid": ticket.valid,
        "protocol_version": ticket.protocol_version,
        "cipher": ticket.cipher,
        "throttling": ticket.throttling,
        "token_created": _token_created(ticket.token),
        "fingerprint": load(crypto).sha256(ticket.token.encode())[:4].hex(),
    }


def _token_created(token: str) -> int | None:
    """Return when a Fernet token was made: bytes 1 to 8, big-endian (the Fernet spec)."""
    import base64  # noqa: PLC0415

    try:
        start = base64.urlsafe_b64decode(token[:12])
    except ValueError:
        return None
    created = int.from_bytes(start[1:9], "big")
    return created if len(start) == 9 and is_time(created) else None


def _time(seconds: float, now: float, over: str = "") -> str:
    """Return a time and how far away it is, in one unit; `over` says what then is over."""
    away_s = abs(seconds - now)
    unit, size_s = "s", 1
    for name, least_s in (("min", 60), ("h", 3600), ("days", 86400)):
        if away_s >= 2 * least_s:
            unit, size_s = name, least_s
    away = f"{away_s / size_s:.0f} {unit}"
    utc = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    return f"{utc} UTC ({f'in {away}' if seconds > now else f'{over}{away} ago'})"


def _run_show_ticket(arguments: Sequence[str]) -> None:
    with show_parser().read(arguments) as options:
        fields = show_ticket(find_ticket(options), options.crypto)
        if options.json:
            import json  # noqa: PLC0415

            print(json.dumps(fields))
            return
        now = time.time()
        for name, value in fields.items():
            if name in ("valid", "token_created") and isinstance(value, (int, float)):
                value = _time(value, now, "expired " if name == "valid" else "")
            print(f"{name.replace('_', ' ')}: {'none' if value is None else value}")


def run(arguments: Sequence[str]) -> None:
    """Do what the arguments ask for: a command, or run the client. Raises SniTunError."""
    command = arguments[0] if arguments else ""
    if command == "show-ticket":
        _run_show_ticket(arguments[1:])
    else:
        _run_client(arguments)


def _run_client(arguments: Sequence[str]) -> None:
    with parser().read(arguments) as options:
        ticket = find_ticket(options)

        def make() -> Client:
            return Client(
                ticket,
                options.endpoint,
                server=options.server or "",
                once=options.once,
                budget_bytes=CLIENT_BUDGET_BYTES,
                crypto=options.crypto,
                congestion_control=options.congestion_control,
            )

        if options.check:
            check_service(PROGRAM, options, make)
        else:
            run_service(make)


def console() -> int:
    """The console script `snitun-client`."""
    return main(PROGRAM, run, sys.argv[1:])

"""`python -m snitun_sync.client`: options, and the ticket from wherever it comes."""

from __future__ import annotations

import logging
import sys

from ..errors import ConfigurationError, TicketError, UsageError
from ..net.tuning import CLIENT_BUDGET_BYTES
from ..program import (
    Parser,
    crypto,
    hide_argument,
    main,
    read_text,
    run_service,
    set_up_logging,
    take_environment,
)
from ..protocol.cipher import CIPHERS, IV_SIZE, KEY_SIZE
from ..protocol.names import parse_address
from ..protocol.ticket import LINE_PREFIX, RELAY_PORT, TOKEN_PREFIX, Ticket, is_token
from .client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

PROGRAM = "snitun-client"
TOKEN_ENVIRONMENT = "SNITUN_TOKEN"

DESCRIPTION = """\
Keeps a tunnel to a relay, and brings what devices send there to a local service.
TLS runs from the device to that service: the relay sees no plaintext."""

EPILOG = f"""\
A ticket is what `snitun-master ticket` prints: a JSON object, or a line that starts
with `{LINE_PREFIX}`. Every option takes either form. Give it by one of
  --token-file FILE       the best way: nobody else can read a file with mode 600
  --token -               from standard input
  ${TOKEN_ENVIRONMENT}           removed from the environment at once
  --token TICKET          others may see it in ps for a moment
A bare Fernet token does as well, together with --server, --aes-key-file and
--aes-iv-file (hex), and --protocol-version and --cipher where they aren't 0 and aes-cbc.

exit codes (sysexits.h):
   0  stopped by SIGTERM or SIGINT
  64  an option is wrong
  66  a file can't be read
  69  the relay can't be reached or the tunnel was lost (only with --once),
      or a ticket for a single connection is used up
  70  a defect of this program, or of the relay's
  77  the relay refused the token or the key (only with --once)
  78  the ticket or a setting is wrong

Without --once it tries again after every error of the network, for ever."""


def parser() -> Parser:
    """Return the client's options."""
    options = Parser(PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    options.add_argument("--token", metavar="TICKET", help="the ticket itself, or - (see below)")
    options.add_argument("--token-file", metavar="FILE", help="a file with the ticket, or -")
    options.add_argument(
        "--endpoint",
        metavar="HOST:PORT",
        default="127.0.0.1:443",
        help="the local service: HOST:PORT, [IPV6]:PORT or unix:/PATH (default: 127.0.0.1:443)",
    )
    options.add_argument(
        "--server", metavar="HOST[:PORT]", help="the relay, instead of the ticket's (port: 443)"
    )
    options.add_argument(
        "--once", action="store_true", help="make one attempt, and exit with its reason"
    )
    bare = options.add_argument_group("with a bare Fernet token")
    bare.add_argument("--aes-key-file", metavar="FILE", help="32 bytes in hex")
    bare.add_argument("--aes-iv-file", metavar="FILE", help="16 bytes in hex")
    bare.add_argument("--protocol-version", metavar="N", type=int, choices=(0, 1, 2))
    bare.add_argument("--cipher", choices=CIPHERS, metavar="NAME", help=", ".join(CIPHERS))
    options.add_network()
    options.add_common()
    return options


def find_ticket(options: Namespace) -> Ticket:
    """Return the ticket that the options, or the environment, give. Raises ConfigurationError."""
    from_environment = take_environment(TOKEN_ENVIRONMENT)
    if options.token is not None and options.token_file is not None:
        raise UsageError("--token and --token-file: expected one of them, found both")
    if options.token_file is not None:
        text, source = read_text(options.token_file, "--token-file"), "--token-file"
    elif options.token == "-":
        text, source = read_text("-", "--token"), "--token -"
    elif options.token is not None:
        text, source = options.token, "--token"
        hide_argument(text)
        logging.getLogger("snitun_sync").warning(
            "--token on the command line can be seen in ps and in the shell's history: "
            "better --token-file FILE, --token - or $%s",
            TOKEN_ENVIRONMENT,
        )
    elif from_environment is not None:
        text, source = from_environment, f"${TOKEN_ENVIRONMENT}"
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
        if source == "--token" and ("/" in text or "." in text) and len(text) < 256:
            if not text.startswith(LINE_PREFIX):
                hint = "; for a file there is --token-file"
        elif text.startswith(TOKEN_PREFIX):
            hint = "; a Fernet token's length is a multiple of 4: was it cut short?"
        raise TicketError(f"{source}: {error}{hint}") from None


def _bare(token: str, options: Namespace) -> Ticket:
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
        aes_key=_hex_file(values["aes_key_file"], "--aes-key-file", KEY_SIZE),
        aes_iv=_hex_file(values["aes_iv_file"], "--aes-iv-file", IV_SIZE),
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


def run(arguments: Sequence[str]) -> None:
    """Run the client with these arguments until it ends. Raises SniTunError."""
    options = parser().parse_args(arguments)
    set_up_logging(options.log_level)
    ticket = find_ticket(options)
    run_service(
        lambda: Client(
            ticket,
            options.endpoint,
            server=options.server or "",
            once=options.once,
            budget_bytes=CLIENT_BUDGET_BYTES,
            crypto=crypto(options.crypto),
            congestion_control=options.congestion_control,
        )
    )


def console() -> int:
    """The console script `snitun-client`."""
    return main(PROGRAM, run, sys.argv[1:])

"""`python -m snitun_sync.server`: the relay's options."""

from __future__ import annotations

import sys

from ..options import SOURCES, Parser, check_service
from ..program import main, read_fernet_keys, run_service
from .server import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "snitun-server"

DESCRIPTION = """\
The relay: takes devices' TLS connections, finds their hostname in the ClientHello and
passes them on, as they are, through the tunnel of the client that serves that name."""

EPILOG = f"""\
The file of --fernet-key-file has one key a line (`snitun-master new-key` makes one), the
newest first; # starts a comment. Tokens made with any of them are accepted.

{SOURCES}

exit codes (sysexits.h):
   0  stopped by SIGTERM or SIGINT, or --check found nothing wrong
  64  an option is wrong
  66  a file can't be read
  69  an address can't be listened on
  70  a defect of this program
  78  a setting is wrong"""


def parser() -> Parser:
    """Return the relay's options."""
    options = Parser(PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    options.add_argument(
        "--fernet-key-file", metavar="FILE", required=True, help="the keys that sign tokens, or -"
    )
    options.add_argument(
        "--listen",
        metavar="HOST:PORT",
        action="append",
        default=("*:443",),
        help="where devices and clients connect; repeatable; *:PORT for all addresses, IPv4 and "
        "IPv6 (default: *:443)",
    )
    options.add_argument(
        "--peer-listen",
        metavar="HOST:PORT",
        action="append",
        default=(),
        help="where clients connect; --listen is for devices alone then; repeatable",
    )
    options.add_network()
    options.add_common()
    return options


def run(arguments: Sequence[str]) -> None:
    """Run the relay with these arguments until it ends. Raises SniTunError."""
    with parser().read(arguments) as options:
        keys = read_fernet_keys(options.fernet_key_file, options.source("fernet_key_file"))

        def make() -> Server:
            return Server(
                keys,
                options.listen,
                options.peer_listen,
                crypto=options.crypto,
                congestion_control=options.congestion_control,
            )

        if options.check:
            check_service(PROGRAM, options, make)
        else:
            run_service(make)


def console() -> int:
    """The console script `snitun-server`."""
    return main(PROGRAM, run, sys.argv[1:])

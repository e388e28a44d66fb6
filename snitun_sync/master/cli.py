"""`python -m snitun_sync.master`: new keys, devices and tickets, and their service."""

from __future__ import annotations

import logging
import os
import sys
import time
from argparse import ArgumentTypeError

from ..errors import UsageError
from ..options import SOURCES, Parser, duration_s
from ..program import main, read_fernet_keys, say
from ..protocol.aes import load
from ..protocol.cipher import CIPHERS, IV_SIZE, KEY_SIZE
from ..protocol.names import dns_name, parse_address, shown
from ..protocol.ticket import RELAY_PORT, Ticket
from ..protocol.token import MAX_TEXT, Fernet, new_fernet_key
from . import devices, serve
from .tokens import Device, seal_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..options import Options

PROGRAM = "snitun-master"

DESCRIPTION = """\
Makes the Fernet keys that session master and relay share, gives devices a secret of their
own, and makes the tickets with which clients open their tunnels. All of these are secrets:
write them to files with mode 600."""

EPILOG = f"""\
  umask 077
  snitun-master new-key > fernet.key
  snitun-master ticket --fernet-key-file fernet.key --hostname home.example.com \\
      --server relay.example.com:443 > ticket
  snitun-master device add home.example.com --database snitun.db > home.secret

{SOURCES}

exit codes (sysexits.h):
   0  done
  64  an option is wrong, there is no such device, or another one has the name
  66  a file can't be read
  69  `serve`: --listen can't be listened on
  70  a defect of this program
  74  standard output can't be written, or the database can't be used
  78  a file's content, or a setting, is wrong"""

TICKET_DESCRIPTION = """\
Prints a ticket: the relay's address, the token that the relay accepts, and the key of
the tunnel, new for each ticket. It is valid for one client at a time."""

LONGEST_S = 100 * 365 * 86400
PUBLISHED_MAX_TEXT = 2048  # published relays read a token once

log = logging.getLogger("snitun_sync")


def parser() -> Parser:
    """Return the session master's options."""
    options = Parser(PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    commands = options.add_subparsers(dest="command", metavar="COMMAND", required=True)
    new_key = commands.add_parser(
        "new-key", help="print a new Fernet key", description="Prints a new Fernet key."
    )
    new_key.add_common()
    ticket = commands.add_parser(
        "ticket", help="print a ticket for a client", description=TICKET_DESCRIPTION
    )
    text = "the relay's keys; the first signs"
    ticket.add("--fernet-key-file FILE", text, is_required=True)
    ticket.add("--hostname NAME", "the name that leads to the client", is_required=True)
    ticket.add("--server HOST[:PORT]", "where the client finds the relay", is_required=True)
    ticket.add("--alias NAME", "one more name; repeatable", [], action="append")
    text = "like 90s, 12h, 30d, 8w (default: 30d)"
    ticket.add("--valid-for TIME", text, "30d", type=_valid_for_s)
    ticket.add("--protocol-version N", "default: 2", 2, choices=(0, 1, 2))
    text = f"{', '.join(CIPHERS)} (default: aes-cbc)"
    ticket.add("--cipher NAME", text, "aes-cbc", choices=CIPHERS)
    ticket.add(
        "--single-use",
        "for aes-gcm, whose key must never serve a second connection: the client exits "
        "when its tunnel ends",
    )
    text = "the session master's: the ticket can be revoked then, with the device of its name"
    ticket.add("--database FILE", text, "")
    ticket.add("--json", "print JSON instead of the line")
    ticket.add_common()
    devices.add_parsers(commands)
    serve.add_parser(commands)
    return options


def make_ticket(options: Options, now: float) -> Ticket:
    """Return the ticket that the options ask for, created at `now`. Raises ConfigurationError."""
    if options.cipher == "aes-gcm" and not options.single_use:
        raise UsageError(
            "--cipher aes-gcm: its key must never serve two connections, so the client can't "
            "reconnect with the ticket; add --single-use if that is meant, or use aes-cbc or "
            "aes-gcm-siv"
        )
    if options.single_use and options.cipher != "aes-gcm":
        raise UsageError(f"--single-use: only with --cipher aes-gcm, found {options.cipher}")
    parse_address(options.server, "--server", default_port=RELAY_PORT)
    keys = read_fernet_keys(options.fernet_key_file, options.source("fernet_key_file"))
    valid = int(now) + options.valid_for
    hostname = dns_name(options.hostname, "--hostname")
    aliases = [dns_name(alias, "--alias") for alias in options.alias]
    device = Device("", hostname, aliases)
    if options.database:
        device = _known_device(hostname, aliases, valid, options)
    device.protocol_version, device.cipher = options.protocol_version, options.cipher
    aes_key, aes_iv = os.urandom(KEY_SIZE), os.urandom(IV_SIZE)
    fernet = Fernet(keys, load(options.crypto))
    token = seal_token(device, fernet, aes_key=aes_key, aes_iv=aes_iv, valid=valid, now=now)
    if len(token) > MAX_TEXT:
        raise UsageError(
            f"--alias: {len(device.aliases)} names make a token of {len(token)} characters, "
            f"and relays take at most {MAX_TEXT}"
        )
    if len(token) > PUBLISHED_MAX_TEXT:
        text = "the token has %d characters; relays of other makes take at most %d"
        log.warning(text, len(token), PUBLISHED_MAX_TEXT)
    return Ticket(
        server=options.server,
        token=token,
        aes_key=aes_key,
        aes_iv=aes_iv,
        hostname=hostname,
        valid=valid,
        protocol_version=device.protocol_version,
        cipher=device.cipher,
        throttling=device.throttling,
    )


def _known_device(hostname: str, aliases: list[str], valid: float, options: Options) -> Device:
    """Return the device that has this hostname, which is added if there is none."""
    from .store import Store  # noqa: PLC0415  which brings SQLite

    with Store(options.database) as store:
        for device in store.devices():
            if device.hostname == hostname and device.revoked is None:
                break
        else:
            device = store.add(hostname, aliases, has_secret=False)[0]
        if not {*aliases} <= {hostname, *device.aliases}:
            raise UsageError(
                f"--alias: device {device.id} has other names; see {PROGRAM} device rename --help"
            )
        return store.note_ticket(device.id, valid)


def _valid_for_s(text: str) -> int:
    # Not without a unit: `30` may be meant as days.
    try:
        seconds = int(duration_s(text)) if text[-1:].isalpha() else 0
    except ArgumentTypeError:
        seconds = 0
    if not 0 < seconds <= LONGEST_S:
        raise ArgumentTypeError(
            f"{shown(text)}; expected a number and one of s, m, h, d, w, up to 100 years"
        )
    return seconds


def run(arguments: Sequence[str]) -> None:
    """Print what the arguments ask for. Raises SniTunError."""
    with parser().read(arguments) as options:
        if options.command == "new-key":
            say(new_fernet_key(os.urandom), is_secret=True)
            return
        if options.command in ("device", "audit"):
            devices.run(options)
            return
        if options.command == "serve":
            serve.run(options, lambda former: parser().read(arguments, former))
            return
        ticket = make_ticket(options, time.time())
        say(ticket.to_json() if options.json else ticket.to_line(), is_secret=True)


def console() -> int:
    """The console script `snitun-master`."""
    return main(PROGRAM, run, sys.argv[1:])

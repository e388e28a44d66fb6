"""`python -m snitun_sync.server`: the relay's options."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial

from ..errors import ConfigurationError
from ..net.tuning import CHANNEL_IDLE_S, RELAY_BUDGET_BYTES
from ..options import SOURCES, Parser, check_service
from ..program import (
    check_certificates,
    file_stamp,
    main,
    read_fernet_keys,
    read_secret,
    run_service,
)
from .server import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..net.service import Service
    from ..options import Options

PROGRAM = "snitun-server"
# What SIGHUP doesn't change.
AT_START = """admin admin-token-file budget congestion-control crypto listen log-format
    peer-listen revocations revocations-ca route state-dir"""
# How soon a changed file of Fernet keys counts: before a session master signs by it.
LOOK_EACH_S = 1.0

log = logging.getLogger("snitun_sync")

DESCRIPTION = """\
The relay: takes devices' TLS connections, finds their hostname in the ClientHello and
passes them on, as they are, through the tunnel of the client that serves that name."""

EPILOG = f"""\
{PROGRAM} status asks the running one how it is; it has a --help, too.

The file of --fernet-key-file has one key a line (`snitun-master new-key` makes one), the
newest first; # starts a comment. Tokens made with any of them are accepted. It is read again
when it changes.

{SOURCES}

SIGTERM and SIGINT stop it: open connections get the time of --grace, unless the signal comes
once more. SIGHUP reads settings and keys again; of the settings, --channel-idle, --grace and
--log-level count from then on. SIGUSR1 logs how it goes. Under systemd it tells that, too.

exit codes (sysexits.h):
   0  stopped by SIGTERM or SIGINT, or --check found nothing wrong
  64  an option is wrong
  66  a file can't be read
  69  an address can't be listened on
  70  a defect of this program
  74  standard output can't be written (--check and status)
  78  a setting is wrong"""


def parser() -> Parser:
    """Return the relay's options."""
    options = Parser(PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    text = "the keys that sign tokens, or -"
    options.add("--fernet-key-file FILE", text, is_required=True)
    options.add(
        "--listen HOST:PORT",
        "where devices and clients connect; repeatable; *:PORT for all addresses, IPv4 and "
        "IPv6 (default: *:443)",
        ("*:443",),
        action="append",
    )
    text = "where clients connect; --listen is for devices alone then; repeatable"
    options.add("--peer-listen HOST:PORT", text, (), action="append")
    options.begin("session master")
    options.add(
        "--revocations URL",
        "follow the session master's list of revoked tokens, such as https://HOST[:PORT]: it "
        "cuts their clients' tunnels, and refuses them later on",
        "",
    )
    text = (
        "the certificates, in PEM, that the session master's goes back to (default: the system's)"
    )
    options.add("--revocations-ca FILE", text, "")
    options.add(
        "--state-dir DIR",
        "keep the list there for the next start (default: systemd's $STATE_DIRECTORY, if any)",
        os.environ.get("STATE_DIRECTORY", "").partition(":")[0],
    )
    options.add(
        "--route NAME=HOST:PORT",
        "pass devices on that ask for NAME to an address or unix:/PATH, without a client; with "
        ",proxy-v2 behind it that is told the device's address; repeatable",
        (),
        action="append",
    )
    options.add_service(budget_bytes=RELAY_BUDGET_BYTES, channel_idle_s=CHANNEL_IDLE_S)
    options.add_common()
    return options


def run(arguments: Sequence[str]) -> None:
    """Do what the arguments ask for: a command, or run the relay. Raises SniTunError."""
    if arguments and arguments[0] == "status":
        from ..status_command import run_status  # noqa: PLC0415

        run_status(PROGRAM, arguments[1:])
    else:
        _run_relay(arguments)


def _run_relay(arguments: Sequence[str]) -> None:
    with parser().read(arguments) as options:
        current, stamp = options, file_stamp(options.fernet_key_file)

        def make() -> Server:
            # Read when it is needed; what is wrong is told at once.
            check_certificates(options.revocations_ca, "--revocations-ca")
            server = Server(
                _keys(options),
                options.listen,
                options.peer_listen,
                budget_bytes=options.budget,
                channel_idle_s=options.channel_idle,
                crypto=options.crypto,
                congestion_control=options.congestion_control,
                admin=options.admin,
                admin_token=read_secret(options.admin_token_file, "--admin-token-file"),
                routes=options.route,
                revocations=options.revocations,
                revocations_ca=options.revocations_ca,
                state_dir=options.state_dir,
            )
            server.loop.call_later(LOOK_EACH_S, partial(look, server))
            return server

        def reload(service: Service) -> Options:
            nonlocal current
            assert isinstance(service, Server)
            with parser().read(arguments, options) as fresh:
                service.reconfigure(_keys(fresh), channel_idle_s=fresh.channel_idle)
                current = fresh
                return fresh

        def look(server: Server) -> None:
            nonlocal stamp
            server.loop.call_later(LOOK_EACH_S, partial(look, server))
            former, stamp = stamp, file_stamp(current.fernet_key_file)
            if stamp != former:
                try:
                    server.reconfigure(_keys(current))
                    log.info("the Fernet keys were read again")
                except ConfigurationError as error:
                    log.error("%s; the former keys stay", error)

        if options.check:
            check_service(PROGRAM, options, make)
        else:
            run_service(make, options, reload, AT_START)


def _keys(options: Options) -> list[str]:
    return read_fernet_keys(options.fernet_key_file, options.source("fernet_key_file"))


def console() -> int:
    """The console script `snitun-server`."""
    return main(PROGRAM, run, sys.argv[1:])

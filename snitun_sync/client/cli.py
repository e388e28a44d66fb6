"""`python -m snitun_sync.client`: options, the ticket from wherever it comes, and `show-ticket`."""

from __future__ import annotations

import logging
import os
import sys
import time

from ..errors import ConfigurationError, TicketError, UsageError
from ..net.loop import utc
from ..net.tuning import CHANNEL_IDLE_S, CLIENT_BUDGET_BYTES, CONNECT_S, KEEPALIVE_S
from ..options import COMMAND_LINE, DEFAULT, ENDPOINTS, SOURCES, Parser, check_service
from ..program import main, read_secret, read_text, run_service, say
from ..protocol.aes import load
from ..protocol.cipher import CIPHERS, IV_SIZE, KEY_SIZE
from ..protocol.names import parse_address
from ..protocol.ticket import LINE_PREFIX, RELAY_PORT, TOKEN_PREFIX, Ticket, is_token
from .client import Client
from .settings import (
    ENDPOINT,
    MAX_CHANNELS,
    PROXY_PROTOCOLS,
    RECONNECT_SPREAD_S,
    EndpointSettings,
    Settings,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..net.service import Service
    from ..options import Options

PROGRAM = "snitun-client"
# What SIGHUP doesn't change.
AT_START = "admin admin-token-file crypto log-format"
TOKEN_ENVIRONMENT = "SNITUN_TOKEN"
# systemd.exec(5): where LoadCredential= puts what it loads, and what ours is called there.
CREDENTIALS_ENVIRONMENT = "CREDENTIALS_DIRECTORY"
CREDENTIAL = "snitun-ticket"
SECRET_CREDENTIAL = "snitun-device-secret"
STATE_ENVIRONMENT = "STATE_DIRECTORY"  # StateDirectory=: one, or several with `:` between them
# What goes with a bare Fernet token alone.
BARE = ("aes_key_file", "aes_iv_file", "protocol_version", "cipher")

DESCRIPTION = """\
Keeps a tunnel to a relay, and brings what devices send there to a local service.
TLS runs from the device to that service: the relay sees no plaintext."""

EPILOG = f"""\
{PROGRAM} show-ticket tells what is in a ticket, without its secrets, and
{PROGRAM} status asks the running one how it is. Both have a --help, too.

{SOURCES}

A ticket is what `snitun-master ticket` prints: a JSON object, or a line that starts
with `{LINE_PREFIX}`. Every option takes either form. Give it by one of
  --token-file FILE       the best way: nobody else can read a file with mode 600
  --token -               from standard input
  ${TOKEN_ENVIRONMENT}           removed from the environment at once
  --token TICKET          others may see it in ps for a moment
  LoadCredential={CREDENTIAL}:FILE   in a unit of systemd, and nothing else
A bare Fernet token does as well, together with --server, --aes-key-file and
--aes-iv-file (hex), and --protocol-version and --cipher where they aren't 0 and aes-cbc.

Instead of a ticket, --master and --device-secret-file name a session master, which gives one
ticket after the other, each in time; in --state-dir the latest is kept for the next start.

SIGTERM and SIGINT stop it: open connections get the time of --grace, unless the signal comes
once more. SIGHUP reads settings and ticket again: open connections stay, and a tunnel with
another ticket takes over once it is proven. Only --admin, its token, --crypto and --log-format
stay as they were. SIGUSR1 logs how it goes. Under systemd it tells that, too.

exit codes (sysexits.h):
   0  stopped by SIGTERM or SIGINT, or --check found nothing wrong
  64  an option is wrong
  66  a file can't be read
  69  relay or session master can't be reached, or the tunnel was lost (only with
      --once), or a ticket for a single connection is used up
  70  a defect of this program, or of the relay's
  74  standard output can't be written (--check and the commands)
  77  relay or session master refused this client (only with --once, or with
      --exit-on-refusal: three times in a row, or it was revoked)
  78  the ticket or a setting is wrong

Without --once it tries again after every failure, for ever."""

SHOW_DESCRIPTION = """\
Prints what may be shown of a ticket: neither its token nor its key. Two tickets with the
same fingerprint have the same token."""


def parser() -> Parser:
    """Return the client's options."""
    options = Parser(PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    options.add(
        "--endpoint [NAME=]ADDRESS",
        "the local service: HOST:PORT, [IPV6]:PORT or unix:/PATH; may be repeated, with the "
        f"names that lead there, like *.home.example.com=127.0.0.1:8123 (default: {ENDPOINT})",
        [ENDPOINT],
        action="append",
    )
    _add_ticket(options)
    options.begin("how the service is reached, by all of --endpoint")
    options.add("--tls-cert FILE", "end TLS here, with this certificate and its chain (PEM)", "")
    text = "the certificate's key (default: it is in the same file); both are read when they change"
    options.add("--tls-key FILE", text, "")
    text = "which protocols to offer, best first, such as h2,http/1.1 (default: http/1.1)"
    options.add("--tls-alpn NAMES", text, "")
    options.add(
        "--proxy-protocol VERSION",
        "tell the service each device's address, by the PROXY protocol, v1 or v2",
        "",
        choices=PROXY_PROTOCOLS,
    )
    text = "see so often, like 30s, whether it is there: /ready tells (default: never)"
    options.add("--health-interval TIME", text, 0.0)
    options.add("--health-path PATH", "see that by GET PATH, not just by connecting", "")
    text = "how long a device waits for the service (default: 10s)"
    options.add("--connect-timeout TIME", text, CONNECT_S)
    options.begin("devices")
    options.add(
        "--acme-endpoint ADDRESS",
        "who answers the questions of a certificate authority (TLS-ALPN-01): an ACME client",
        "",
    )
    text = "let devices in from this network only, like 203.0.113.0/24; may be repeated"
    options.add("--allow CIDR", text, [], action="append")
    options.add("--allow-file FILE", "the same for the networks in a file, one a line", "")
    text = "keep devices out that are in this network; may be repeated, goes before --allow"
    options.add("--block CIDR", text, [], action="append")
    options.add("--block-file FILE", "the same for the networks in a file, one a line", "")
    options.begin("the way to the relay")
    options.add(
        "--proxy URL",
        "go through http://[USER[:PASSWORD]@]HOST[:PORT] (CONNECT) or socks5://… (port: 1080)",
        "",
        is_secret=True,
    )
    options.add("--proxy-password-file FILE", "instead of the URL's password")
    options.add(
        "--keepalive TIME",
        "ask the relay for a sign of life after so long without a byte; it has 15 s to answer "
        "(default: 50s)",
        KEEPALIVE_S,
    )
    options.add(
        "--reconnect-spread TIME",
        "reconnect within this time to a relay that went away, so that not all its clients "
        "come at once (default: 10s)",
        RECONNECT_SPREAD_S,
    )
    options.add("--once", "make one attempt, and exit with its reason")
    text = "exit with 77 when this client was refused three times in a row, or is revoked"
    options.add("--exit-on-refusal", text)
    options.begin("the self-probe")
    options.add(
        "--probe TIME",
        "open the own hostname from outside, as a device would, so often, like 5m: what it "
        "shows must be the endpoint's certificate (default: never)",
        0.0,
    )
    text = "where devices find the hostname (default: the hostname itself, port 443)"
    options.add("--probe-address HOST[:PORT]", text, "")
    options.add_service(budget_bytes=CLIENT_BUDGET_BYTES, channel_idle_s=CHANNEL_IDLE_S)
    text = f"connections of devices at a time (default: {MAX_CHANNELS})"
    options.add("--max-channels N", text, MAX_CHANNELS)
    options.add("--max-new-channels N", "new ones in a second (default: 0, no limit)", 0)
    options.add_common()
    return options


def show_parser() -> Parser:
    """Return the options of `show-ticket`."""
    options = Parser(f"{PROGRAM} show-ticket", description=SHOW_DESCRIPTION)
    options.add("--json", "print JSON; times in Unix seconds")
    _add_ticket(options)
    options.add_common()
    return options


def _add_ticket(options: Parser) -> None:
    """Add the options that give a ticket."""
    options.add("--token TICKET", "the ticket itself, or -", is_secret=True)
    options.add("--token-file FILE", "a file with the ticket, or -")
    options.add("--server HOST[:PORT]", "the relay, instead of the ticket's (port: 443)")
    options.begin("with a session master, instead of a ticket")
    options.add("--master URL", "https://HOST[:PORT][/PATH]: who gives the tickets", "")
    text = "ID.SECRET, as `snitun-master device add` prints it, or the SECRET alone"
    options.add("--device-secret-file FILE", text)
    options.add("--device-id ID", "this client's id there, where the file has none", "")
    text = "the certificates to trust (PEM; default: the system's)"
    options.add("--master-ca FILE", text, "")
    text = f"where the latest ticket is kept (default: ${STATE_ENVIRONMENT}, or nowhere)"
    options.add("--state-dir DIR", text, "")
    options.begin("with a bare Fernet token")
    options.add("--aes-key-file FILE", "32 bytes in hex")
    options.add("--aes-iv-file FILE", "16 bytes in hex")
    options.add("--protocol-version N", "0, 1 or 2", choices=(0, 1, 2))
    options.add("--cipher NAME", ", ".join(CIPHERS), choices=CIPHERS)


def find_ticket(options: Options) -> Ticket | None:
    """Return the ticket that the options give, None with --master. Raises ConfigurationError."""
    if options.master:
        for name in ("token", "token_file", *BARE):
            if getattr(options, name) is not None:
                source = options.source(name)
                raise UsageError(f"--master: {source} is there, too; expected one of them")
        return None
    ranks = options.rank("token"), options.rank("token_file")
    if options.token is not None and ranks[0] == ranks[1]:
        raise UsageError("--token: --token-file is there, too; expected one of them, found both")
    if options.token_file is not None and ranks[1] < ranks[0]:
        source = options.source("token_file")
        text = read_text(options.token_file, source)
        if options.token_file != "-":
            source = f"{source}: {options.token_file}"
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
    elif path := _credential(CREDENTIAL):
        text, source = read_text(path, "LoadCredential="), f"LoadCredential=: {path}"
    else:
        raise UsageError(
            f"no ticket: expected --token-file FILE, --token - or ${TOKEN_ENVIRONMENT}, or --master"
        )
    text = text.strip()
    if is_token(text):
        return _bare(text, options)
    for name in BARE:
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


def _of_master(options: Options) -> dict[str, str]:
    """Return what Settings take for the session master."""
    state_dir = options.state_dir or os.environ.get(STATE_ENVIRONMENT, "").partition(":")[0]
    return {
        "master": options.master,
        "device_id": options.device_id,
        "device_secret_file": options.device_secret_file
        or (_credential(SECRET_CREDENTIAL) if options.master else ""),
        "master_ca": options.master_ca,
        "state_dir": state_dir,
    }


def _credential(name: str) -> str:
    """Return the path of what systemd has loaded by that name, "" if there is none."""
    path = os.path.join(os.environ.get(CREDENTIALS_ENVIRONMENT, ""), name)
    return path if os.path.isabs(path) and os.path.exists(path) else ""


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
        "token_created": ticket.created,
        "fingerprint": load(crypto).sha256(ticket.token.encode())[:4].hex(),
    }


def _kept_ticket(options: Options) -> Ticket:
    from .master import MasterSettings  # noqa: PLC0415

    settings = MasterSettings(*_of_master(options).values())
    ticket = settings.kept_ticket()
    if not settings.state_dir:
        raise UsageError("--master: a ticket from there is kept only with --state-dir")
    if ticket is None:
        said = f"no ticket of this device is kept in {settings.state_dir}"
        raise ConfigurationError(f"--state-dir: {said}")
    return ticket


def _run_show_ticket(arguments: Sequence[str]) -> None:
    with show_parser().read(arguments) as options:
        fields = show_ticket(find_ticket(options) or _kept_ticket(options), options.crypto)
        if options.json:
            import json  # noqa: PLC0415

            say(json.dumps(fields))
            return
        now = time.time()
        for name, value in fields.items():
            if name in ("valid", "token_created") and isinstance(value, (int, float)):
                value = _time(value, now, "expired " if name == "valid" else "")
            say(f"{name.replace('_', ' ')}: {'none' if value is None else value}")


def _time(seconds: float, now: float, over: str = "") -> str:
    """Return a time and how far away it is; `over` says what then is over."""
    from ..status_command import span  # noqa: PLC0415

    away = span(abs(seconds - now))
    return f"{utc(seconds)} UTC ({f'in {away}' if seconds > now else f'{over}{away} ago'})"


def run(arguments: Sequence[str]) -> None:
    """Do what the arguments ask for: a command, or run the client. Raises SniTunError."""
    command = arguments[0] if arguments else ""
    if command == "show-ticket":
        _run_show_ticket(arguments[1:])
    elif command == "status":
        from ..status_command import run_status  # noqa: PLC0415

        run_status(PROGRAM, arguments[1:])
    else:
        _run_client(arguments)


def _run_client(arguments: Sequence[str]) -> None:
    with parser().read(arguments) as options:

        def make() -> Client:
            return Client(**_settings(options))

        def reload(service: Service) -> Options:
            assert isinstance(service, Client)
            with parser().read(arguments, options) as fresh:
                service.reconfigure(Settings(**_settings(fresh)))
                return fresh

        if options.check:
            check_service(PROGRAM, options, make)
        else:
            run_service(make, options, reload, AT_START)


def _settings(options: Options) -> dict[str, Any]:
    """Return what Settings take. Raises ConfigurationError."""
    password = None
    if options.proxy_password_file is not None:
        password = read_secret(options.proxy_password_file, options.source("proxy_password_file"))
    is_default = options.rank("endpoint") == DEFAULT
    return {
        "ticket": find_ticket(options),
        **_of_master(options),
        # With sections for endpoints, none is there by default.
        "endpoint": [] if options.sections and is_default else options.endpoint,
        "endpoints": [_endpoint(*section) for section in options.sections.items()],
        "tls_cert": options.tls_cert,
        "tls_key": options.tls_key,
        "tls_alpn": options.tls_alpn,
        "proxy_protocol": options.proxy_protocol,
        "health_interval_s": options.health_interval,
        "health_path": options.health_path,
        "connect_timeout_s": options.connect_timeout,
        "acme_endpoint": options.acme_endpoint,
        "allow": options.allow,
        "allow_file": options.allow_file,
        "block": options.block,
        "block_file": options.block_file,
        "server": options.server or "",
        "proxy": options.proxy,
        "proxy_password": password,
        "once": options.once,
        "exit_on_refusal": options.exit_on_refusal,
        "keepalive_s": options.keepalive,
        "reconnect_spread_s": options.reconnect_spread,
        "probe_s": options.probe,
        "probe_address": options.probe_address,
        "budget_bytes": options.budget,
        "max_channels": options.max_channels,
        "max_new_channels": options.max_new_channels,
        "channel_idle_s": options.channel_idle,
        "congestion_control": options.congestion_control,
        "crypto": options.crypto,
        "admin": options.admin,
        "admin_token": read_secret(options.admin_token_file, "--admin-token-file"),
    }


def _endpoint(name: str, section: dict[str, Any]) -> EndpointSettings:
    """Return what the section [endpoint NAME …] of the file says. Raises ConfigurationError."""
    for key in ("health_interval", "connect_timeout"):
        if key in section:
            section = {**section, f"{key}_s": section[key]}
            del section[key]
    if "address" not in section:
        raise ConfigurationError(f"{name}: no address; expected address = HOST:PORT or unix:/PATH")
    hostnames = name.rpartition(f"[{ENDPOINTS}")[2][:-1].split()
    if not hostnames:
        raise ConfigurationError(f"{name}: no name; expected [{ENDPOINTS}HOSTNAME …] or *")
    return EndpointSettings(names=hostnames, source=f"{name} ", **section)


def console() -> int:
    """The console script `snitun-client`."""
    return main(PROGRAM, run, sys.argv[1:])

"""The command `status` of client and relay: asks the running one, and prints a table.

    snitun-client status [--json] [--watch]

It exits with 0 if the other one is ready, with 1 if it isn't, and with 69 if it doesn't answer.
"""

from __future__ import annotations

import json
import socket
import time

from .errors import LinkError, NotReadyError, UnreachableError
from .net.dialing import blocking_dial
from .options import Parser
from .program import read_secret
from .protocol.names import Address, parse_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from .options import Options

    Report = dict[str, Any]

WATCH_S = 2.0
ANSWER_S = 10.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024
CHANNELS_SHOWN = 20
CLIENTS_SHOWN = 50
CLEAR_SCREEN = "\033[H\033[2J"

DESCRIPTION = """\
Asks the running {program} how it is, at the address that it was given by --admin, and prints
a table. Exit code: 0 if it is ready, 1 if it isn't, 69 if it doesn't answer."""


def parser(program: str) -> Parser:
    """Return the options of the command."""
    options = Parser(f"{program} status", description=DESCRIPTION.format(program=program))
    options.add_argument(
        "--admin",
        metavar="ADDRESS",
        default=f"unix:/run/{program}/admin",
        help=f"HOST:PORT or unix:/PATH (default: unix:/run/{program}/admin)",
    )
    options.add_argument("--admin-token-file", metavar="FILE", help="what may ask")
    options.add_argument("--json", action="store_true", help="print all of it as JSON")
    options.add_argument(
        "--watch", action="store_true", help=f"print it anew every {WATCH_S:.0f} s, until Ctrl-C"
    )
    options.add_common()
    return options


def run_status(program: str, arguments: Sequence[str]) -> None:
    """Do the command. Raises UnreachableError, NotReadyError."""
    with parser(program).read(arguments) as options:
        address = parse_address(options.admin, "--admin", can_be_unix=True)
        token = read_secret(options.admin_token_file, "--admin-token-file")
        report = ask(address, token)
        _show(report, options)
        while options.watch:
            time.sleep(WATCH_S)
            try:
                _show(ask(address, token), options)
            except LinkError as error:  # it may come back
                print(CLEAR_SCREEN * (not options.json) + str(error), flush=True)
    if not report["is_ready"]:
        raise NotReadyError(f"not ready: {report['reason']}")


def _show(report: Report, options: Options) -> None:
    if options.json:
        print(json.dumps(report), flush=True)
    else:
        print(CLEAR_SCREEN * options.watch + "\n".join(table(report)), flush=True)


def ask(address: Address, token: str) -> Report:
    """Return the report of who answers at `address`. Raises LinkError."""
    request = f"GET /status HTTP/1.1\r\nHost: {address.host or 'localhost'}\r\n"
    if token:
        request += f"Authorization: Bearer {token}\r\n"
    answer = b""
    try:
        with blocking_dial(address, ANSWER_S) as sock:
            sock.settimeout(ANSWER_S)
            sock.sendall(request.encode() + b"\r\n")
            sock.shutdown(socket.SHUT_WR)
            while len(answer) < MAX_ANSWER_BYTES and (piece := sock.recv(65536)):
                answer += piece
    except OSError as error:
        raise UnreachableError(
            f"--admin: nobody answers at {address}: {error.strerror or error}; was the running "
            "one started with --admin?"
        ) from None
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b"\r\n")[0].decode("latin-1").split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/"):
        raise LinkError(f"--admin: what answers at {address} doesn't speak HTTP")
    if words[1] != "200":
        said = body.decode("utf-8", "replace").strip()[:200]
        raise LinkError(f"--admin: {address} answers {' '.join(words[1:])}: {said}")
    try:
        report = json.loads(body)
        if "is_ready" in report and "summary" in report:
            found: Report = report
            return found
    except (ValueError, TypeError):
        pass
    raise LinkError(f"--admin: {address} is no client or relay of snitun_sync")


# --- the table ---------------------------------------------------------------------------


def table(report: Report) -> Iterator[str]:
    """Yield the lines for people."""
    yield from _rows([("ready" if report["is_ready"] else "NOT READY", report["summary"])])
    if report["program"] == "snitun-client":
        yield from _rows(_client_rows(report))
    else:
        yield from _rows(_relay_rows(report))
    yield from _list_of_channels(report["channels"])


def _client_rows(report: Report) -> Iterator[tuple[str, str]]:
    ticket, tunnel = report["ticket"], report["tunnel"]
    if not report["is_ready"]:
        yield "reason", report["reason"]
    relay = report["relay"]
    if report["proxy"]:
        relay += f", by the proxy {report['proxy']}"
    yield "relay", relay
    if tunnel is not None:
        yield (
            "tunnel",
            f"{tunnel['local_address']} to {tunnel['relay_address']}, proven for "
            f"{span(tunnel['proven_for_s'])}, last byte {span(tunnel['silent_for_s'])} ago, "
            f"round trip {_or_dash(tunnel['round_trip_ms'])} ms",
        )
    elif report["retry_in_s"] is not None:
        yield "next attempt", f"in {span(max(0, report['retry_in_s']))}"
    yield "endpoint", report["endpoint"]
    expiry = ticket["expires_in_s"]
    if expiry is not None:
        when = f"expires in {span(expiry)}" if expiry > 0 else f"EXPIRED {span(-expiry)} ago"
        yield (
            "ticket",
            f"{when} ({ticket['valid']}), version {ticket['protocol_version']}, {ticket['cipher']}",
        )
    if report["clock_doubt"]:
        yield "clock", f"DOUBTFUL: {report['clock_doubt']}"
    if report["probe"] is not None:
        checked, failure = report["probe"]["checked"], report["probe"]["failure"]
        yield "self-probe", f"{failure or 'devices get through'} ({checked or 'not yet'})"
    yield from _common_rows(report)
    refused = sum(report["refused_channels"].values())
    if refused:
        limits = ", ".join(f"{name} {n}" for name, n in report["refused_channels"].items())
        yield "refused", f"{refused} channels, by limit: {limits}"
    yield (
        "attempts",
        f"{report['attempts']}; failed: "
        + (", ".join(f"{kind} {n}" for kind, n in report["failures"].items()) or "none"),
    )
    for ending in reversed(report["endings"]):
        proven_s, count = ending["proven_s"], ending["count"]
        after = f"after {span(proven_s)}: " if proven_s is not None else ""
        times = f" ({count} times)" if count > 1 else ""
        yield "ended", f"{ending['time']} {after}{ending['reason']}{times}"


def _relay_rows(report: Report) -> Iterator[tuple[str, str]]:
    yield (
        "clients",
        f"{report['tunnels']} connected, {report['hostnames']} hostnames, "
        f"{report['tunnels_opened']} tunnels so far, {report['takeovers']} takeovers",
    )
    yield "refused", f"{report['refused_clients']} clients, {report['refused_devices']} devices"
    yield "accepted", f"{report['accepted']} connections, {report['arrivals']} not known yet"
    yield from _common_rows(report)
    for client in report["clients"][:CLIENTS_SHOWN]:
        yield (
            client["hostname"],
            f"{client['address']}, up for {span(client['up_for_s'])}, "
            f"{client['channels']} channels, token valid until {client['valid']}",
        )
    left_out = len(report["clients"]) - CLIENTS_SHOWN
    if left_out > 0:
        yield "…", f"and {left_out} more; --json has them"


def _common_rows(report: Report) -> Iterator[tuple[str, str]]:
    channels, memory = report["channels"], report["memory"]
    yield (
        "channels",
        f"{channels['open']} open, {channels['opened']} so far, {channels['aborted']} cut; "
        f"{size(channels['received_bytes'])} from the tunnel, "
        f"{size(channels['sent_bytes'])} into it",
    )
    yield (
        "memory",
        f"{size(memory['resident_bytes'])} resident; {size(memory['held_bytes'])} of "
        f"{size(memory['budget_bytes'])} held",
    )
    yield "version", f"{report['version']}, started {report['started']}"


def _rows(rows: Any) -> Iterator[str]:
    for name, text in rows:
        yield f"{name:<13} {text}"


def _list_of_channels(channels: Report) -> Iterator[str]:
    if not channels["list"]:
        return
    yield ""
    yield (
        f"{'device':<24} {'age':>8} {'idle':>8} {'from tunnel':>12} {'into tunnel':>12} {'held':>9}"
    )
    for channel in channels["list"][:CHANNELS_SHOWN]:
        yield (
            f"{channel['device']:<24} {span(channel['age_s']):>8} {span(channel['idle_s']):>8} "
            f"{size(channel['received_bytes']):>12} {size(channel['sent_bytes']):>12} "
            f"{size(channel['held_bytes']):>9}"
        )
    left_out = channels["open"] - CHANNELS_SHOWN
    if left_out > 0:
        yield f"… and {left_out} more"


def span(seconds: float) -> str:
    """Return a time span as people read it, in its largest unit or two."""
    for unit, unit_s, small, small_s in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if seconds >= unit_s:
            return f"{seconds // unit_s:.0f} {unit} {seconds % unit_s // small_s:.0f} {small}"
    return f"{seconds // 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"

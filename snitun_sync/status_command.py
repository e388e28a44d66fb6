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
from .program import read_secret, say
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
    where = f"unix:/run/{program}/admin"
    options.add("--admin ADDRESS", f"HOST:PORT or unix:/PATH (default: {where})", where)
    options.add("--admin-token-file FILE", "what may ask")
    options.add("--json", "print all of it as JSON")
    options.add("--watch", f"print it anew every {WATCH_S:.0f} s, until Ctrl-C")
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
                say(CLEAR_SCREEN * (not options.json) + str(error))
    if not report["is_ready"]:
        raise NotReadyError(f"not ready: {report['reason']}")


def _show(report: Report, options: Options) -> None:
    clear = CLEAR_SCREEN * options.watch
    say(json.dumps(report) if options.json else clear + "\n".join(table(report)))


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
    rows = {"snitun-client": _client_rows, "snitun-server": _relay_rows}.get(
        report["program"], _figure_rows
    )
    for name, text in (
        ("ready" if report["is_ready"] else "NOT READY", report["summary"]),
        *rows(report),
    ):
        yield f"{name:<13} {text}"
    if "channels" in report:
        yield from _list_of_channels(report["channels"])


def _figure_rows(report: Report) -> Iterator[tuple[str, str]]:
    yield from report["figures"].items()  # the session master's


def _client_rows(report: Report) -> Iterator[tuple[str, str]]:
    ticket, tunnel, probe = report["ticket"], report["tunnel"], report["probe"]
    if not report["is_ready"]:
        yield "reason", report["reason"]
    by = f", by the proxy {report['proxy']}" if report["proxy"] else ""
    yield "relay", (report["relay"] or "not known yet") + by
    if tunnel is not None:
        round_trip = "–" if tunnel["round_trip_ms"] is None else f"{tunnel['round_trip_ms']:g}"
        yield (
            "tunnel",
            f"{tunnel['local_address']} to {tunnel['relay_address']}, proven for "
            f"{span(tunnel['proven_for_s'])}, last byte {span(tunnel['silent_for_s'])} ago, "
            f"round trip {round_trip} ms",
        )
    elif report["retry_in_s"] is not None:
        yield "next attempt", f"in {span(max(0, report['retry_in_s']))}"
    for endpoint in report["endpoints"]:
        yield "endpoint", _endpoint(endpoint)
    if report["master"] is not None:
        yield "master", _master(report["master"])
    expiry = ticket and ticket["expires_in_s"]
    if expiry is not None:
        when = f"expires in {span(expiry)}" if expiry > 0 else f"EXPIRED {span(-expiry)} ago"
        text = "{} ({valid}), version {protocol_version}, {cipher}"
        yield "ticket", text.format(when, **ticket)
    if report["clock_doubt"]:
        yield "clock", f"DOUBTFUL: {report['clock_doubt']}"
    if probe is not None:
        said = probe["failure"] or "devices get through"
        yield "self-probe", f"{said} ({probe['checked'] or 'not yet'})"
    yield from _common_rows(report)
    refused = report["refused_channels"]
    if any(refused.values()):
        yield "refused", f"{sum(refused.values())} channels, by limit: {_counts(refused)}"
    yield "attempts", f"{report['attempts']}; failed: {_counts(report['failures'])}"
    for ending in reversed(report["endings"]):
        proven_s, count = ending["proven_s"], ending["count"]
        after = f"after {span(proven_s)}: " if proven_s is not None else ""
        times = f" ({count} times)" if count > 1 else ""
        yield "ended", f"{ending['time']} {after}{ending['reason']}{times}"


def _master(master: Report) -> str:
    text, asked_in_s = "{url}, device {device_id}".format_map(master), master["asked_in_s"]
    if asked_in_s is not None:
        text += f", asked again in {span(asked_in_s)}"
    return f"{text}; {master['failure']}" if master["failure"] else text


def _endpoint(endpoint: Report) -> str:
    names, certificate = ", ".join(endpoint["names"]), endpoint["certificate"]
    text = endpoint["address"] if names == "*" else f"{names} at {endpoint['address']}"
    if certificate is not None and certificate["valid_until"]:
        text += f", certificate valid until {certificate['valid_until']}"
    return f"{text}; DOWN" if endpoint["is_down"] else text


def _relay_rows(report: Report) -> Iterator[tuple[str, str]]:
    text = "{tunnels} connected, {hostnames} hostnames, {tunnels_opened} tunnels so far, "
    yield "clients", (text + "{takeovers} takeovers").format_map(report)
    yield "refused", "{refused_clients} clients, {refused_devices} devices".format_map(report)
    yield "accepted", "{accepted} connections, {arrivals} not known yet".format_map(report)
    if (news := report.get("revocations")) is not None:
        text = "serial {serial}, {entries} devices; refused {refused_tokens}, cut {cut_tunnels}"
        away = f"; AWAY since {news['away_since']}: {news['failure']}" if news["failure"] else ""
        yield "revocations", f"{text.format_map(news)}, {news['url']}{away}"
    for route in report.get("routes", ()):
        text = "{name} to {address}, {open} open, {opened} so far, {failed} failed"
        yield "route", text.format_map(route)
    yield from _common_rows(report)
    for client in report["clients"][:CLIENTS_SHOWN]:
        text = "{address}, up for {}, {channels} channels, token valid until {valid}"
        yield client["hostname"], text.format(span(client["up_for_s"]), **client)
    left_out = report["hostnames"] - CLIENTS_SHOWN
    if left_out > 0:
        yield "…", f"and {left_out} more; --json has {len(report['clients'])}"


def _common_rows(report: Report) -> Iterator[tuple[str, str]]:
    channels, memory = report["channels"], report["memory"]
    received, sent = size(channels["received_bytes"]), size(channels["sent_bytes"])
    text = "{open} open, {opened} so far, {aborted} cut; ".format_map(channels)
    yield "channels", f"{text}{received} from the tunnel, {sent} into it"
    held, budget = size(memory["held_bytes"]), size(memory["budget_bytes"])
    yield "memory", f"{size(memory['resident_bytes'])} resident; {held} of {budget} held"
    yield "version", "{version}, started {started}".format_map(report)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _list_of_channels(channels: Report) -> Iterator[str]:
    form = "{:<24} {:>8} {:>8} {:>12} {:>12} {:>9}"
    if channels["list"]:
        yield ""
        yield form.format("device", "age", "idle", "from tunnel", "into tunnel", "held")
    for channel in channels["list"][:CHANNELS_SHOWN]:
        times = (span(channel[name]) for name in ("age_s", "idle_s"))
        sizes = (size(channel[f"{name}_bytes"]) for name in ("received", "sent", "held"))
        yield form.format(channel["device"], *times, *sizes)
    left_out = channels["open"] - CHANNELS_SHOWN
    if left_out > 0:
        yield f"… and {left_out} more"


def span(seconds: float) -> str:
    """Return a time span as people read it, in the largest unit of which it has two."""
    for unit, unit_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"

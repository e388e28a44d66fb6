"""The commands `device …` and `audit` of the session master: who gets tokens from it."""

from __future__ import annotations

import json
import logging
import sys
import time

from ..errors import StoreError, UsageError
from ..program import say
from ..protocol.cipher import CIPHERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from ..options import Options, Parser
    from .store import Store
    from .tokens import Device

    Commands = argparse._SubParsersAction[Parser]

AUDIT_LINES, MAX_AUDIT_LINES = 50, 1_000_000
SHOWN_AUDIT_LINES = 10
NONE = "-"
DATE = len("2026-01-01")

ADD = """\
Adds a device and prints ID.SECRET, the file that its client takes. This is the only time
that the secret is shown: the database has a hash of it.

  umask 077
  snitun-master device add home.example.com --database snitun.db > home.secret
  snitun-client --master https://master.example.com --device-secret-file home.secret …"""
LIST = """\
Lists all devices, by hostname. Times are UTC; `seen` is when the client last got a token.

  snitun-master device list --database snitun.db"""
SHOW = """\
Shows one device, and the latest that was done with it.

  snitun-master device show home.example.com --database snitun.db"""
RENAME = """\
Gives a device another hostname, and these aliases instead of those that it has. Its tokens
count no longer; its client gets others by itself, with the same secret.

  snitun-master device rename home.example.com house.example.com --database snitun.db"""
ROTATE = """\
Gives a device another secret and prints ID.SECRET. The former secret, and all tokens and
tickets of the device, count no longer.

  umask 077
  snitun-master device rotate home.example.com --database snitun.db > home.secret"""
REVOKE = """\
Refuses a device for ever: its secret, its tokens, its tickets. Relays that follow this
session master cut what it has open. Its names are free for other devices.

  snitun-master device revoke home.example.com --database snitun.db"""
REMOVE = """\
Does what `revoke` does, and forgets the device; its lines in the audit log stay.

  snitun-master device remove home.example.com --database snitun.db"""
AUDIT = """\
Prints who was added, renamed, rotated, revoked and removed, the latest last. Times are UTC.

  snitun-master audit --limit 1000 --database snitun.db"""

log = logging.getLogger("snitun_sync")


def add_parsers(commands: Commands) -> None:
    """Add the commands to those of the program."""
    text = "add, list, show, rename, rotate, revoke or remove devices"
    device = commands.add_parser("device", help=text, description=f"Commands that {text}.")
    actions = device.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text, description in (
        ("add", "add a device and print its secret", ADD),
        ("list", "list all devices", LIST),
        ("show", "show a device", SHOW),
        ("rename", "give a device other names", RENAME),
        ("rotate", "give a device another secret, and print it", ROTATE),
        ("revoke", "refuse a device for ever", REVOKE),
        ("remove", "refuse a device and forget it", REMOVE),
    ):
        action = actions.add_parser(name, help=text, description=description)
        if name not in ("add", "list"):
            action.add_argument("device", metavar="ID", help="the device's id or its hostname")
        if name in ("add", "rename"):
            action.add_argument("name", metavar="HOSTNAME", help="the name that leads to it")
            action.add("--alias NAME", "one more name; repeatable", [], action="append")
        if name == "add":
            action.add("--throttling N", "the most DATA frames a second (default: no limit)")
            text = f"{', '.join(CIPHERS)} (default: aes-cbc)"
            action.add("--cipher NAME", text, "aes-cbc", choices=CIPHERS)
            action.add("--protocol-version N", "default: 2", 2, choices=(0, 1, 2))
        _add_common(action)
    audit = commands.add_parser("audit", help="print what was done", description=AUDIT)
    audit.add_argument("device", metavar="ID", nargs="?", help="only with this device")
    audit.add("--limit N", f"how many lines (default: {AUDIT_LINES})", AUDIT_LINES)
    _add_common(audit)


def _add_common(parser: Parser) -> None:
    parser.add("--database FILE", "the session master's database", is_required=True)
    parser.add("--json", "print JSON, with times in Unix seconds")
    parser.add_common()


def run(options: Options) -> None:
    """Do what the options ask for. Raises SniTunError."""
    from .store import Store  # noqa: PLC0415  which brings SQLite

    action = options.action if options.command == "device" else "audit"
    with Store(options.database, must_exist=action != "add") as store:
        _ACTIONS[action](store, options)


def _add(store: Store, options: Options) -> None:
    device, secret = store.add(
        options.name,
        options.alias,
        throttling=options.throttling,
        cipher=options.cipher,
        protocol_version=options.protocol_version,
    )
    try:
        _say_secret(device, secret, options)
    except Exception as error:
        try:
            store.remove(device.id)
        except StoreError as also:
            stays = f"device {device.id}, whose secret nobody has, is still there"
            raise StoreError(f"{error}; {stays}: {also}") from None
        raise StoreError(f"{error}; the device isn't added") from None
    _tell(f"device {device.id} is added: {_names(device)}; its secret is not shown again")


def _list(store: Store, options: Options) -> None:
    devices = store.devices()
    if options.json:
        say(json.dumps([_object(device) for device in devices], indent=1))
        return
    # Names come last: they may be long, and there may be many.
    table = [["id", "added", "seen", "revoked", "names"]]
    for device in devices:
        added, seen, revoked = map(_time, (device.created, device.last_seen, device.revoked))
        table.append([device.id, added[:DATE], seen, revoked[:DATE], _names(device)])
    _say_table(table)


def _show(store: Store, options: Options) -> None:
    device = store.find(options.device)
    lines = store.audit(SHOWN_AUDIT_LINES, device.id)
    if options.json:
        say(json.dumps([{**_object(device), "audit": _audit_objects(lines)}], indent=1))
        return
    rows = {
        "id": device.id,
        "hostname": device.hostname,
        "aliases": ", ".join(device.aliases) or NONE,
        "secret": "yes" if device.has_secret else "none: it has tickets only",
        "throttling": NONE if device.throttling is None else str(device.throttling),
        "cipher": device.cipher,
        "protocol version": str(device.protocol_version),
        "added": _time(device.created),
        "seen": _time(device.last_seen),
        "revoked": _time(device.revoked),
    }
    _say_table([*rows.items(), ("", ""), *((_time(line[0]), line[3]) for line in lines)])


def _rename(store: Store, options: Options) -> None:
    device_id = store.find(options.device).id
    store.rename(device_id, options.name, options.alias)
    _say_done(store.find(device_id), "has these names now", options)


def _rotate(store: Store, options: Options) -> None:
    device = store.find(options.device)
    secret = store.rotate(device.id)
    try:
        _say_secret(device, secret, options)
    except Exception as error:
        raise StoreError(f"{error}; nobody has the new secret: rotate it again") from None
    _tell(f"device {device.id}: {_names(device)}; the former secret counts no longer")


def _revoke(store: Store, options: Options) -> None:
    device_id = store.find(options.device).id
    store.revoke(device_id)
    _say_done(store.find(device_id), "is revoked", options)


def _remove(store: Store, options: Options) -> None:
    device = store.find(options.device)
    store.remove(device.id)
    _say_done(device, "is removed", options)


def _audit(store: Store, options: Options) -> None:
    if not 0 < options.limit <= MAX_AUDIT_LINES:
        raise UsageError(f"--limit: {options.limit}; expected 1 to {MAX_AUDIT_LINES}")
    lines = store.audit(options.limit, _audited_id(store, options.device))
    if options.json:
        say(json.dumps(_audit_objects(lines), indent=1))
    else:
        table = [("time", "device", "what")]
        _say_table([*table, *((_time(line[0]), line[1], ": ".join(line[2:])) for line in lines)])


def _audited_id(store: Store, text: str | None) -> str:
    """Return the id of a device that may be removed by now, "" for all."""
    from ..protocol.device import is_device_id  # noqa: PLC0415

    if text is None or is_device_id(text):
        return text or ""
    return store.find(text).id


_ACTIONS = {
    "add": _add,
    "list": _list,
    "show": _show,
    "rename": _rename,
    "rotate": _rotate,
    "revoke": _revoke,
    "remove": _remove,
    "audit": _audit,
}


# --- texts -------------------------------------------------------------------------------


def _say_secret(device: Device, secret: str, options: Options) -> None:
    credential = f"{device.id}.{secret}"
    if sys.stdout is None:
        raise OSError("standard output: it is closed")
    if options.json:
        credential = json.dumps({**_object(device), "credential": credential})
    say(credential, is_secret=True)


def _tell(text: str) -> None:
    """Print what is for people only: what is on standard output goes into a file."""
    try:
        if sys.stderr is not None:
            print(text, file=sys.stderr)
    except OSError:
        pass


def _say_done(device: Device, done: str, options: Options) -> None:
    say(json.dumps(_object(device)) if options.json else f"{device.id} {done}: {_names(device)}")


def _names(device: Device) -> str:
    return ", ".join((device.hostname, *device.aliases))


def _time(seconds: int | None) -> str:
    return NONE if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _object(device: Device) -> dict[str, Any]:
    return {name: getattr(device, name) for name in device.__slots__}


def _audit_objects(lines: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(("time", "device_id", "hostname", "what"), line)) for line in lines]


def _say_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with each column as wide as it has to be."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    say("\n".join(lines))

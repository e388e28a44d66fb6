"""Who may come: lists of networks that devices are let in from, or not.

Loaded only where there is a list. What is looked up for each device is kept small, as lists of
whole countries are long: 5 bytes for a network of IPv4, 17 for one of IPv6.
"""

from __future__ import annotations

import socket
from functools import partial

from ..errors import ConfigurationError, UnreadableError, UsageError
from ..net.sockets import unpack_ip
from ..protocol.names import IPV4_MAPPED, known_ip, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LINE = 65536  # characters, comments included


class Access:
    """Decides on each device. An address of IPv4 that is mapped into IPv6 counts as IPv4."""

    def __init__(self, allow: Networks | None, block: Networks | None) -> None:
        """Let in who is in `allow`, where there is one, and not in `block`."""
        self._allow, self._block = allow, block

    def refusal(self, address: bytes) -> str:
        """Return why a device with this packed address is not let in, "" if it is.

        Zeros stand for an unknown one, which no list can judge.
        """
        ip = known_ip(address)
        if not ip:
            return "its address is unknown"
        if self._block is not None and (network := self._block.find(ip)):
            return f"in --block {network}"
        if self._allow is not None and not self._allow.find(ip):
            return "not in --allow"
        return ""


class Networks:
    """Networks, none of them within another one."""

    def __init__(self, records: list[bytes]) -> None:
        """Take those of `records`, see `_record`, in any order."""
        # By the size of an address: records one behind the other, in the order of addresses.
        self._rows = {4: bytearray(), 16: bytearray()}
        for record in sorted(records):
            row, address = self._rows[len(record) - 1], record[:-1]
            # What contains another one begins with it or before it, and is shorter.
            if not row or not _is_in(address, row[-len(record) :]):
                row += record

    def find(self, address: bytes) -> str:
        """Return the network that a packed address is in, as text; "" for none."""
        row, size = self._rows[len(address)], len(address) + 1
        low, high = 0, len(row) // size
        while low < high:
            middle = (low + high) // 2
            if row[middle * size : (middle + 1) * size - 1] <= address:
                low = middle + 1
            else:
                high = middle
        # The last one that begins at the address or before it; nothing where all begin later.
        record = row[(low - 1) * size : low * size]
        if not record or not _is_in(address, record):
            return ""
        return f"{unpack_ip(bytes(record[:-1]))}/{record[-1]}"


def read_networks(cidrs: Sequence[str], path: str, option: str) -> Networks | None:
    """Return the networks of an option, such as --allow, and of the file of --allow-file.

    None where there is neither. Those of the file stand one a line; a comment begins with `#`.
    Raises ConfigurationError.
    """
    if not cidrs and not path:
        return None
    records = [_record(text.strip(), option, UsageError) for text in cidrs]
    if path:
        option += "-file"
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(iter(partial(file.readline, MAX_LINE), ""), 1):
                    text = line.partition("#")[0].strip()
                    if text:
                        place = f"{option}: {path}: line {number}"
                        records.append(_record(text, place, ConfigurationError))
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            reason = getattr(error, "strerror", None) or error
            raise UnreadableError(f"{option}: can't read {path}: {reason}") from None
    return Networks(records)


def _record(text: str, place: str, kind: type[ConfigurationError]) -> bytes:
    """Return a network, or a single address: the packed address, then the prefix's length."""
    host, slash, length_text = text.partition("/")
    try:
        address = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except (OSError, ValueError):
        expected = "an address, or a network such as 203.0.113.0/24 or 2001:db8::/32"
        raise kind(f"{place}: {shown(text)}; expected {expected}") from None
    bits = length = 8 * len(address)
    if slash:
        is_number = length_text.isascii() and length_text.isdigit() and len(length_text) <= 3
        if not is_number or int(length_text) > bits:
            said = f"{place}: {shown(text)}: prefix length {shown(length_text)}"
            raise kind(f"{said}, not a number from 0 to {bits}")
        length = int(length_text)
    start = _prefix(address, length) << bits - length
    if start != int.from_bytes(address, "big"):
        meant = f"{unpack_ip(start.to_bytes(len(address), 'big'))}/{length}"
        said = f"{place}: {shown(text)} has bits set behind the first {length}"
        raise kind(f"{said}; expected the network {meant}, or the address {host}")
    if length >= 96 and address.startswith(IPV4_MAPPED):
        address, length = address[len(IPV4_MAPPED) :], length - 96
    return address + bytes((length,))


def _is_in(address: bytes, record: bytes | bytearray) -> bool:
    length = record[-1]
    return _prefix(address, length) == _prefix(record[:-1], length)


def _prefix(address: bytes | bytearray, length: int) -> int:
    """Return the first `length` bits of an address."""
    return int.from_bytes(address, "big") >> 8 * len(address) - length

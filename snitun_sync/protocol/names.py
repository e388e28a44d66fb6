"""Hostnames, addresses and times as people and JSON write them.

One way to compare names, one to write HOST:PORT.
"""

from __future__ import annotations

from ..errors import ConfigurationError, wrong_setting

MAX_HOSTNAME = 253  # RFC 1035, without the trailing dot
MAX_SHOWN = 40
LATEST = 10**11  # UTC, Unix seconds: the year 5138
IPV4_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 §2.5.5.2
_LABEL = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
_IPV6 = frozenset("0123456789abcdefABCDEF:.")


def normal_hostname(text: str) -> str:
    """Return `text` as names are compared: lower case, no trailing dot (RFC 4343, RFC 6066)."""
    return text.lower()[:-1] if text.endswith(".") else text.lower()


def is_hostname(text: str) -> bool:
    """Tell whether `text`, in normal form, can stand in DNS and in a TLS server name."""
    labels = text.split(".")
    return 0 < len(text) <= MAX_HOSTNAME and all(
        0 < len(label) <= 63 and label[0] != "-" and label[-1] != "-" and _LABEL.issuperset(label)
        for label in labels
    )


def is_dns_name(text: str) -> bool:
    """Tell whether devices can ask for `text`, in normal form: no IP address (RFC 6066 §3)."""
    return is_hostname(text) and not text.rpartition(".")[2].isdigit()


def no_dns_name(text: str) -> str:
    """Return what is wrong where `is_dns_name` isn't so, for a message."""
    expected = "labels of up to 63 characters, a-z, 0-9, - and _ (others as xn--…)"
    return f"{shown(text)} is not a DNS name; expected {expected}"


def dns_name(text: str, name: str) -> str:
    """Return a name that devices ask for, in normal form.

    `name` is where it comes from, for the error, as `parse_address` has it.
    """
    found = normal_hostname(text)
    if not is_dns_name(found):
        raise wrong_setting(name, no_dns_name(text))
    return found


def known_ip(address: bytes) -> bytes:
    """Return a packed IP address, one mapped into IPv6 as IPv4; b"" for zeros: it is unknown."""
    if address.startswith(IPV4_MAPPED):
        address = address[len(IPV4_MAPPED) :]
    return address if any(address) else b""


def is_time(value: object) -> bool:
    """Tell whether `value` is a number, and UTC Unix seconds in a time that clocks can show."""
    # bool is an int in Python, but not a number in JSON
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < LATEST  # type: ignore[operator]


def shown(text: str) -> str:
    """Return `text` for a message; only its length where it may be a secret in a wrong place."""
    return repr(text) if len(text) < MAX_SHOWN else f"{len(text)} characters"


class Address:
    """Where to connect or listen: `host` and `port`, or `path` for a unix socket.

    An empty `host` stands for all addresses of the machine (to listen on).
    """

    __slots__ = ("host", "path", "port")

    def __init__(self, host: str = "", port: int = 0, path: str = "") -> None:
        self.host, self.port, self.path = host, port, path

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host or "*"
        return f"{host}:{self.port}"


def parse_address(
    text: str,
    name: str,
    *,
    default_port: int | None = None,
    can_be_unix: bool = False,
    can_be_any: bool = False,
) -> Address:
    """Read `HOST:PORT`, `[IPV6]:PORT` or, where allowed, `unix:/path`, `*:PORT` and `:PORT`.

    `name` is the option or field that `text` came from, for the message of the
    error that is raised when it can't be read: UsageError for an option (`--…`),
    else ConfigurationError. The port may be
    missing where there is a `default_port`; port 0 passes only where any free
    one will do (`can_be_any`: an address to listen on).
    """
    expected = "HOST:PORT" if default_port is None else "HOST or HOST:PORT"
    expected += ", [IPV6]:PORT" + (" or unix:/PATH" if can_be_unix else "")

    def wrong(reason: str) -> ConfigurationError:
        return wrong_setting(name, f"{reason} in {shown(text)}; expected {expected}")

    if text.startswith("unix:"):
        if not can_be_unix or not text[5:].startswith("/"):
            raise wrong("no absolute path" if can_be_unix else "a unix socket")
        return Address(path=text[5:])
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        is_ip = ":" in host and _IPV6.issuperset(host.partition("%")[0])
        if not bracket or not is_ip or rest[:1] not in ("", ":"):
            raise wrong("no IPv6 address in brackets")
        port_text = rest[1:] if rest else None
    else:
        host, colon, last = text.rpartition(":")
        host, port_text = (host, last) if colon else (text, None)
        if ":" in host and _IPV6.issuperset(host):
            raise wrong("an IPv6 address without brackets")
        if "://" in text:
            raise wrong("a URL")
        if host == "*" and can_be_any:
            host = ""
        if host and not is_hostname(normal_hostname(host)):
            raise wrong("no host name")
    if not host and not can_be_any:
        raise wrong("no host")
    if port_text is None:
        if default_port is None:
            raise wrong("no port")
        return Address(host, default_port)
    lowest = 0 if can_be_any else 1
    is_number = port_text.isascii() and port_text.isdigit() and len(port_text) <= 5
    if not is_number or not lowest <= int(port_text) <= 65535:
        raise wrong(f"port {shown(port_text)}, not a number from {lowest} to 65535,")
    return Address(host, int(port_text))

"""The way out through a proxy, where no other leads to the relay.

HTTP: the method CONNECT (RFC 9110, section 9.3.6), with Basic authentication (RFC 7617).
SOCKS5: RFC 1928, with user and password (RFC 1929). It is the proxy that resolves the
relay's name: inside, the names of the outside may be unknown.
"""

from __future__ import annotations

import binascii
import re
import socket
import time

from ..errors import UsageError
from ..protocol.names import Address, parse_address, shown
from .sockets import host_text, pack_ip, unpack_ip

DEFAULT_PORT = 1080  # curl's, for proxies of any kind
MAX_HEAD_BYTES = 16 * 1024
MAX_REASON = 60  # characters
MAX_SOCKS_LOGIN_BYTES = 255  # of user and of password
_SOCKS_REPLIES = (  # from 1 on
    "general failure/not allowed by its rules/network unreachable/host unreachable/connection "
    "refused/time to live expired/command not supported/address type not supported"
)
_WANTS_LOGIN = "wants a user and password"
_REFUSES_LOGIN = "refuses the user or password"


class Proxy:
    """A proxy, and the login for it. As text it has neither user nor password."""

    __slots__ = ("_password", "_scheme", "_user", "address")

    def __init__(self, scheme: str, address: Address, user: bytes, password: bytes) -> None:
        """Take what `parse_proxy` has read: http or socks5, and b"" for no `user`."""
        self._scheme, self.address = scheme, address
        self._user, self._password = user, password

    def __str__(self) -> str:
        return f"{self._scheme}://{self.address}"

    def blocking_open(self, sock: socket.socket, address: Address, deadline: float) -> None:
        """Let the proxy that `sock` is connected to connect it on to `address`.

        For worker threads. `deadline` is by the monotonic clock. The socket stays the
        caller's; after success it is non-blocking, and what came behind the proxy's
        answer is still in it. Raises OSError, whose text names the proxy.
        """
        try:
            if self._scheme == "http":
                self._blocking_http(sock, address, deadline)
            else:
                self._blocking_socks(sock, address, deadline)
            sock.setblocking(False)
        except socket.timeout:
            raise OSError(f"the proxy {self} sent no whole answer in time") from None
        except OSError as error:
            says = f"failed: {error.strerror}" if error.strerror else error
            raise OSError(f"the proxy {self} {says}") from None

    def _blocking_http(self, sock: socket.socket, address: Address, deadline: float) -> None:
        packed = _packed(address.host)
        target = host_text(unpack_ip(packed) if packed else address.host, address.port)
        request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n".encode()
        if self._user:
            login = binascii.b2a_base64(self._user + b":" + self._password)[:-1]
            request += b"Proxy-Authorization: Basic " + login + b"\r\n"
        head = _blocking_ask(sock, request + b"\r\n", 1, deadline)
        while not head.endswith((b"\n\r\n", b"\n\n")):
            if len(head) == MAX_HEAD_BYTES:
                raise OSError(f"sent a head of more than {MAX_HEAD_BYTES} bytes")
            # Byte by byte: the relay's first bytes may follow at once.
            head += _blocking_ask(sock, b"", 1, deadline)
        line = re.match(rb"HTTP/1\.[0-9] ([0-9]{3})( [^\r\n]*)?\r?\n", head)
        if line is None:
            raise OSError("sent no answer of HTTP/1; is it an HTTP proxy?")
        if line[1] in (b"407", b"401"):  # tinyproxy says 401 to a wrong login
            raise OSError(_REFUSES_LOGIN if self._user else _WANTS_LOGIN)
        if not line[1].startswith(b"2"):
            reason = re.sub(rb"[^ -~]", b"?", line[2] or b"")[: 1 + MAX_REASON]
            raise OSError(f"answered {(line[1] + reason).decode().rstrip()}")

    def _blocking_socks(self, sock: socket.socket, address: Address, deadline: float) -> None:
        # Version, count of methods, methods: 0 is no login, 2 is user and password.
        greeting = b"\5\2\0\2" if self._user else b"\5\1\0"
        version, method = _blocking_ask(sock, greeting, 2, deadline)
        if version != 5:
            raise OSError("sent no answer of SOCKS5; is it a SOCKS5 proxy?")
        if method not in greeting[2:]:
            raise OSError("takes no user and password" if self._user else _WANTS_LOGIN)
        if method == 2:
            login = b"\1" + _with_size(self._user) + _with_size(self._password)
            if _blocking_ask(sock, login, 2, deadline)[1] != 0:
                raise OSError(_REFUSES_LOGIN)
        # Version, command CONNECT, reserved; type (1: IPv4, 3: name, 4: IPv6), address and
        # port. The answer is alike, with a reply code instead of the command.
        packed = _packed(address.host)
        kind = {0: b"\3", 4: b"\1", 16: b"\4"}[len(packed)]
        target = kind + (packed or _with_size(address.host.encode()))
        request = b"\5\1\0" + target + address.port.to_bytes(2, "big")
        version, code, _, bound = _blocking_ask(sock, request, 4, deadline)
        if version != 5 or (code == 0 and bound not in (1, 3, 4)):
            raise OSError("sent a malformed answer")
        if code != 0:
            words = dict(enumerate(_SOCKS_REPLIES.split("/"), 1)).get(code, f"reply code {code}")
            raise OSError(f"can't connect: {words}")
        size = _blocking_ask(sock, b"", 1, deadline)[0] if bound == 3 else 4 * bound
        _blocking_ask(sock, b"", size + 2, deadline)


def parse_proxy(text: str, password: str | None = None) -> Proxy:
    """Read `http://[USER[:PASSWORD]@]HOST[:PORT]` or `socks5://…` (`socks5h://` is the same).

    In USER and PASSWORD, %XX stands for any byte. The port is 1080 if missing, as in curl.
    `password`, without the end of its line, overrides the text's. Raises UsageError, whose
    text shows no user and no password.
    """

    def wrong(reason: str) -> UsageError:
        expected = "http://[USER[:PASSWORD]@]HOST[:PORT] or socks5://…"
        return UsageError(f"--proxy: {reason}; expected {expected}")

    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme not in ("http", "socks5", "socks5h"):
        is_scheme = separator and scheme.isalnum()
        raise wrong(f"the scheme {shown(scheme)}" if is_scheme else "no scheme")
    login, _, place = rest.rpartition("@")
    try:
        address = parse_address(place.removesuffix("/"), "--proxy", default_port=DEFAULT_PORT)
    except UsageError:  # its text would show a login that lacks its @
        raise wrong(f"no HOST or HOST:PORT behind {scheme}://") from None
    user, _, secret = map(_unquoted, login.partition(":"))
    if password is not None:
        secret = password.rstrip("\r\n").encode()
    if secret and not user:
        raise wrong("a password without a user")
    scheme = scheme[: len("socks5")]
    if scheme == "socks5" and max(len(user), len(secret)) > MAX_SOCKS_LOGIN_BYTES:
        raise wrong(f"a user or password of more than {MAX_SOCKS_LOGIN_BYTES} bytes")
    return Proxy(scheme, address, user, secret)


def _unquoted(text: str) -> bytes:
    """Return `text` with each %XX as a byte (RFC 3986, section 2.1); urllib is large."""
    data = text.encode(errors="surrogateescape")
    return re.sub(rb"%([0-9a-fA-F]{2})", lambda found: bytes([int(found[1], 16)]), data)


def _packed(host: str) -> bytes:
    """Return the IP address `host` as 4 or 16 bytes, a name as b"". Raises OSError."""
    try:
        return pack_ip(host)
    except (OSError, ValueError):  # ValueError: a zero byte
        if ":" in host:
            raise OSError(f"can't be asked for {shown(host)}, which is no IPv6 address") from None
        return b""


def _with_size(data: bytes) -> bytes:
    return bytes([len(data)]) + data


def _blocking_ask(sock: socket.socket, request: bytes, size: int, deadline: float) -> bytes:
    """Send `request` and return the next `size` bytes of the answer; take no more."""
    answer = b""
    while request or len(answer) < size:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise socket.timeout
        sock.settimeout(left_s)
        if request:
            sock.sendall(request)
            request = b""
        elif piece := sock.recv(size - len(answer)):
            answer += piece
        else:
            raise OSError("closed the connection before its answer was complete")
    return answer

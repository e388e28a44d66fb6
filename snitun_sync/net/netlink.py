"""Whether addresses, routes or links of this machine have changed (Linux; netlink, rtnetlink(7)).

The kernel tells without being asked: a socket that is watched costs nothing while all
stays as it is.
"""

from __future__ import annotations

import errno
import socket
from struct import Struct

from .loop import READ, Handler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .loop import Loop, Timer

    Seen = dict[tuple[int, int, bytes], bool]
    """Whether it is there or up: an interface's index, an address family and the address in it;
    or 0 and b"" for the interface itself."""

# A change comes as many messages, in as many datagrams: how long they are collected.
SETTLE_S = 0.1
# Datagrams read before the loop looks at other sockets; none is larger than RECEIVE_BYTES.
READS_AT_ONCE = 16
RECEIVE_BYTES = 32 * 1024
SEEN_LIMIT = 1024

# linux/rtnetlink.h: RTMGRP_LINK, and _IFADDR and _ROUTE of both RTMGRP_IPV4 and RTMGRP_IPV6
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_NEWLINK = 16
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_ROUTES = (24, 25)  # RTM_NEWROUTE, RTM_DELROUTE

# linux/netlink.h, struct nlmsghdr, all in the machine's byte order; the size counts the header:
#
#     0       4      6       8          12     16
#     | size  | type | flags | sequence | port |  body …, filled up to 4 bytes
_HEADER = Struct("=IHH8x")
_MULTI = 0x2  # NLM_F_MULTI: a part of the answer to a request
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_REQUEST = Struct("=IHHIIB3x")  # the header, and struct rtgenmsg: the family, 0 for all

# linux/if_addr.h, struct ifaddrmsg, and the attributes behind it (struct rtattr):
#
#     0        1        2       3       4       8
#     | family | prefix | flags | scope | index |
#     0      2      4
#     | size | type |  value …, filled up to 4 bytes
_ADDRESS = Struct("=BxBxI")
_ATTRIBUTE = Struct("=HH")
_TENTATIVE = 0x40  # IFA_F_TENTATIVE: nobody can use it yet
_IFA_ADDRESS, _IFA_LOCAL = 1, 2

# linux/rtnetlink.h, struct ifinfomsg:
#
#     0        1       2      4       8       12
#     | family | empty | type | index | flags | change |
_LINK = Struct("=4xiI")
_LINK_UP = 0x1 | 0x40 | 0x10000  # IFF_UP, IFF_RUNNING, IFF_LOWER_UP: it has a carrier

# linux/rtnetlink.h, struct rtmsg:
#
#     0        1             2        3     4       5          6       7      8       12
#     | family | destination | source | tos | table | protocol | scope | type | flags |
_ROUTE = Struct("=4xB2xBI")
_LOCAL_TABLE = 255
_LOCAL_TYPES = (2, 3, 4, 5)  # local, broadcast, anycast, multicast: they follow the addresses
_CLONED = 0x200  # RTM_F_CLONED: an entry of a cache


class NetworkWatch(Handler):
    """Tells when an address, a route or a link of this machine has come, gone or changed.

    It is a hint: other changes of routes than those that matter here count too.
    """

    __slots__ = ("_changed", "_has_lost", "_loop", "_seen", "_timer")

    def __init__(self, loop: Loop, changed: Callable[[], object]) -> None:
        """Call `changed()` on the loop SETTLE_S after the first message of a change.

        Whoever makes it closes it. Raises OSError where it can't be had: not Linux, or the
        process may not open such sockets.
        """
        family = getattr(socket, "AF_NETLINK", None)
        if family is None:
            raise OSError(errno.EAFNOSUPPORT, "this system has no netlink")
        super().__init__(socket.socket(family, socket.SOCK_RAW, socket.NETLINK_ROUTE))
        self._loop, self._changed = loop, changed
        self._seen: Seen = {}
        self._has_lost = False
        self._timer: Timer | None = None
        assert self.sock is not None
        try:
            self.sock.setblocking(False)
            self.sock.bind((0, _GROUPS))
            # Which addresses are there: routers announce them again every few minutes.
            self.sock.send(_REQUEST.pack(_REQUEST.size, _GETADDR, _REQUEST_DUMP, 1, 0, 0))
            loop.watch(self, READ)
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        """Call nothing any more; harmless when it is closed already."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.close_socket(self)

    def on_ready(self, events: int) -> None:
        assert self.sock is not None
        for _ in range(READS_AT_ONCE):
            try:
                is_due = is_change(self.sock.recv(RECEIVE_BYTES), self._seen)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: more came than the socket holds, and nobody knows what
                is_due = self._has_lost = True
            if is_due and self._timer is None:
                self._timer = self._loop.call_later(SETTLE_S, self._settled)

    def _settled(self) -> None:
        self._timer = None
        if self._has_lost:  # and what was still in the socket came before that
            self._has_lost = False
            self._seen.clear()
        self._changed()

    def fail(self, error: Exception) -> None:
        self.close()


def is_change(data: bytes, seen: Seen) -> bool:
    """Tell whether one of the messages in the datagram `data` is about a change that matters.

    An address counts when that isn't what was `seen` last, which this keeps, SEEN_LIMIT of
    them at most: IPv6 routers have its lifetime set anew again and again, and each time the
    kernel reports it as if it had come. So does a link, when it goes up or down: of IPv4,
    nothing else tells that a cable was pulled. What is malformed is ignored.
    """
    found = False
    for (kind, flags), body in _pieces(data, _HEADER, 0):
        key, is_there = None, kind == _NEWADDR
        if kind in (_NEWADDR, _DELADDR) and len(body) >= _ADDRESS.size:
            key = _usable_address(body)
        elif kind == _NEWLINK and len(body) >= _LINK.size:
            index, link_flags = _LINK.unpack_from(body)
            key, is_there = (index, 0, b""), link_flags & _LINK_UP == _LINK_UP
        elif kind in _ROUTES and len(body) >= _ROUTE.size:
            found = found or _is_route_to_others(body)
        if key is not None and seen.get(key) != is_there:
            # What was there at the start is listed in answer to our request.
            found = found or not flags & _MULTI
            if len(seen) >= SEEN_LIMIT:
                seen.clear()
            seen[key] = is_there
    return found


def _pieces(data: bytes, header: Struct, at: int) -> Iterator[tuple[tuple[int, ...], bytes]]:
    """Return what the header says behind its size, and the body, of each piece from `at` on."""
    while len(data) - at >= header.size:
        size, *fields = header.unpack_from(data, at)
        if not header.size <= size <= len(data) - at:
            break
        yield tuple(fields), data[at + header.size : at + size]
        at += (size + 3) & ~3


def _usable_address(body: bytes) -> tuple[int, int, bytes] | None:
    """Return what identifies the address; None if it isn't usable yet, or malformed."""
    family, flags, index = _ADDRESS.unpack_from(body)
    address = b""
    for (kind,), value in _pieces(body, _ATTRIBUTE, _ADDRESS.size):
        # Where there are both, IFA_ADDRESS is the other end's.
        if kind == _IFA_LOCAL or (kind == _IFA_ADDRESS and not address):
            address = value
    if flags & _TENTATIVE or len(address) not in (4, 16):
        return None
    return index, family, address


def _is_route_to_others(body: bytes) -> bool:
    table, kind, flags = _ROUTE.unpack_from(body)
    return table != _LOCAL_TABLE and kind not in _LOCAL_TYPES and not flags & _CLONED


def local_address_is_gone(sock: socket.socket) -> bool:
    """Tell whether the local IP address of a connected socket isn't this machine's any more.

    Then nothing can arrive there, and whatever waits for it waits in vain. False where it
    can't be told.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        host, _, *rest = sock.getsockname()
        with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0, *rest))
    except OSError as error:
        # ENODEV: the interface in an address's scope has gone, and its addresses with it.
        return error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV)
    return False

"""The head of an HTTP/1 request: its first line and its fields (RFC 9112, 3 and 5).

Nothing that two readers could take for two things gets through: no bare LF, no folded
line, no space before a colon.
"""

from __future__ import annotations

import re

from ..errors import ViolationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    Fields = dict[str, str]
    """Header fields: the name in lower case, and its values joined by ", " (RFC 9110, 5.2)."""

END = b"\r\n\r\n"

# RFC 9110, 5: no control character but tabs, and no name begins with a space. What is no ASCII is
# against the rules in a target, but sent by some; it can't be taken for anything else.
NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
VALUE = re.compile(r"[\t -~\x80-\xff]*")
_FIRST_LINE = re.compile(rf"({NAME.pattern}) ([!-~\x80-\xff]+) HTTP/(1\.[01])", re.ASCII)
_FIELD = re.compile(rf"({NAME.pattern}):({VALUE.pattern})", re.ASCII)


def parse_head(head: bytes) -> tuple[str, str, str, Fields]:
    """Return method, target, version and fields of a request, given without its END.

    The version is "1.0" or "1.1". A field that must be there once, and was there twice, has
    a comma in it. Raises ViolationError.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    request = _FIRST_LINE.fullmatch(first)
    if request is None:
        raise ViolationError("the first line; expected GET /PATH HTTP/1.1")
    fields: Fields = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise ViolationError("a line of the header; expected NAME: VALUE, all of it printable")
        name, value = field[1].lower(), field[2].strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return request[1], request[2], request[3], fields

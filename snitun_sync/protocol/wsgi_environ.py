"""The head of an HTTP request as a WSGI application gets it (PEP 3333)."""

from __future__ import annotations

import re
import sys
from wsgiref.util import FileWrapper

from ..errors import ViolationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .http_head import Fields

    Environ = dict[str, Any]

_ABSOLUTE = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+;=%-]+)(?::([0-9]{0,5}))?", re.ASCII)
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


def new_environ(method: str, target: str, version: str, fields: Fields, scheme: str) -> Environ:
    """Return PEP 3333's environ, but for what is the connection's. Raises ViolationError."""
    hosts = [fields.get("host", "")]  # also in 1.0: nobody is reached without a name
    path, _, query = target.partition("?")
    if absolute := _ABSOLUTE.fullmatch(target):  # it counts, and Host doesn't (RFC 9112, 3.2.2)
        fields["host"] = absolute[1]
        hosts.append(absolute[1])
        path, _, query = absolute[2].partition("?")
        path = path or "/"
    name, port = "", None
    for text in hosts:
        host = _HOST.fullmatch(text)
        if host is None:
            raise ViolationError("Host; expected one name")
        name, port = host[1], host[2]
    if not path.startswith("/") or "#" in target:
        raise ViolationError("the target; expected a path, http://… or https://…")
    raw_path = path.encode("latin-1")
    environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), raw_path).decode(
            "latin-1"
        ),
        "QUERY_STRING": query,
        "REQUEST_URI": target,
        "SERVER_NAME": name,
        "SERVER_PORT": port or ("443" if scheme == "https" else "80"),
        "SERVER_PROTOCOL": f"HTTP/{version}",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
        "wsgi.file_wrapper": FileWrapper,
    }
    for field, value in fields.items():
        if "_" in field:
            continue  # the same key as with "-", which a proxy may have checked
        key = field.upper().replace("-", "_")
        environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value
    return environ

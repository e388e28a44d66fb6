"""What requests to the session master say, and why some are refused."""

from __future__ import annotations

import json
import re
from urllib.parse import parse_qs

from ..errors import ConfigurationError
from ..protocol.device import is_device_id, parse_credential
from ..protocol.names import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Environ = dict[str, Any]
    Headers = list[tuple[str, str]]
    Answer = tuple[int, Headers, bytes]

BODY_BYTES = 16 * 1024
LONGEST_WAIT_S = 60

JSON = ("Content-Type", "application/json")
NO_STORE = ("Cache-Control", "no-store")

_LENGTH = re.compile(r"[0-9]{1,9}")
_HEX = re.compile(r"[0-9a-fA-F]*")


class RefusalError(Exception):
    """The request is answered by an error."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def json_bytes(fields: dict[str, Any]) -> bytes:
    """Return the body of an answer."""
    return json.dumps(fields).encode() + b"\n"


def refusal(status: int, message: str, *headers: tuple[str, str]) -> Answer:
    """Return the answer to what is refused."""
    return status, [JSON, NO_STORE, *headers], json_bytes({"message": message})


def read_body(environ: Environ) -> bytes:
    """Return the body of a request. Raises RefusalError, as the others here do."""
    text = environ.get("CONTENT_LENGTH") or ""
    if not text or "HTTP_TRANSFER_ENCODING" in environ:
        raise RefusalError(411, "expected a Content-Length")
    if _LENGTH.fullmatch(text) is None or int(text) > BODY_BYTES:
        raise RefusalError(413, f"expected a Content-Length of {BODY_BYTES} at most")
    try:
        body: bytes = environ["wsgi.input"].read(int(text))
    except OSError:
        body = b""
    if len(body) < int(text):
        raise RefusalError(400, f"{len(body)} bytes; expected {text}, as Content-Length says")
    return body


def credential(environ: Environ) -> tuple[str, str]:
    """Return id and secret of a request, "" for what isn't there or malformed."""
    scheme, _, text = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    device_id = text.strip().partition(".")[0]
    try:
        if scheme.lower() == "bearer":
            return parse_credential(text)
    except ConfigurationError:
        pass
    return (device_id if is_device_id(device_id) else ""), ""


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a body is."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError("a name that is there twice")
        return fields

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is no number")

    try:
        text = body.decode()
        fields = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise RefusalError(400, "expected a JSON object in UTF-8, each name once")
    return fields


def hex_field(fields: dict[str, Any], name: str, size: int) -> bytes:
    """Return the `size` bytes that a field has in hex."""
    text = fields.get(name)
    if not isinstance(text, str) or len(text) != 2 * size or _HEX.fullmatch(text) is None:
        found = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        found = found if name in fields else "nothing"
        expected = f"{2 * size} hexadecimal digits"
        raise RefusalError(400, f"{name}: found {found}; expected {expected}")
    return bytes.fromhex(text)


def wait_seconds(query: str) -> float:
    """Return what a query says of `wait`, 0 where it says nothing."""
    try:
        texts = parse_qs(query, keep_blank_values=True, max_num_fields=16).get("wait", ["0"])
    except ValueError:
        raise RefusalError(400, "a malformed query; expected ?wait=SECONDS") from None
    text = ",".join(texts)
    if _LENGTH.fullmatch(text) is None or int(text) > LONGEST_WAIT_S:
        raise RefusalError(400, f"wait: {shown(text)}; expected 0 to {LONGEST_WAIT_S} seconds")
    return int(text)


def is_local(environ: Environ) -> bool:
    """Tell whether a request comes from this machine, and from nobody else by a proxy.

    With TLS it may be anybody's: a relay's route brings it, from its own address.
    """
    address = environ.get("REMOTE_ADDR", "").replace("::ffff:", "")
    passed_on = ("HTTP_FORWARDED", "HTTP_X_FORWARDED_FOR", "HTTP_VIA")
    is_loopback = address == "::1" or address.startswith("127.")
    is_direct = environ["wsgi.url_scheme"] == "http"
    return is_loopback and is_direct and not any(name in environ for name in passed_on)

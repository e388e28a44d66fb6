"""One POST over HTTP and TLS by a child process: with it all that it took is gone.

`http.client` and `ssl` take 9 MiB, which Python wouldn't give back, and a client asks its session
master once or twice a day. Request and answer are JSON in pipes: secrets are in no argument
and in no environment. The pipe of the request stays open, so that the child sees the end of a
client that was killed. It imports this module and what it needs below `net` and `protocol`,
nothing of the client.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REQUEST_S = 30.0
# The resolver, and the attempts to connect to several addresses, have limits of their own.
LONGEST_S = 60.0
ANSWER_BYTES = 64 * 1024
# What the child may print: JSON takes up to 6 bytes for one.
PRINTED_BYTES = 8 * ANSWER_BYTES

# Run with the folder of this package, which comes last: what is Python's own goes first.
_CODE = """\
import sys
sys.path = [path for path in sys.path if path] + [sys.argv[1]]
from {}.net.fetch import main
main()"""


class Fetch:
    """A request, for a worker thread; whoever has asked can end it."""

    def __init__(
        self,
        url: str,
        option: str,
        path: str,
        body: str,
        *,
        ca_file: str = "",
        proxy: str = "",
        proxy_password: str | None = None,
    ) -> None:
        """Take the request; `option` is the name of the URL's in messages.

        `proxy` and `proxy_password` are as in proxy.py, the rest is as in https.py.
        """
        self._request = {
            "url": url,
            "option": option,
            "path": path,
            "body": body,
            "ca_file": ca_file,
            "proxy": proxy,
            "proxy_password": proxy_password,
        }
        self._lock = threading.Lock()
        self._pid = 0  # while there is a child that can be killed
        self._is_cancelled = False

    def blocking_run(self, headers: dict[str, str]) -> dict[str, Any]:
        """Send it with these headers; return `status`, `retry_after` and `body` of the answer.

        The latter two are text. Raises OSError with one line that says what went wrong.
        """
        import json  # noqa: PLC0415

        request = {**self._request, "headers": headers}
        answer: dict[str, Any]
        if not sys.executable or hasattr(sys, "frozen") or not hasattr(os, "posix_spawn"):
            answer = _blocking_answer(request)  # there is no Python to be started
        else:
            printed = self._blocking_child(json.dumps(request).encode())
            try:
                answer = json.loads(printed)
            except ValueError:
                answer = {}
            if "status" not in answer and "error" not in answer:
                raise ConnectionError(f"{sys.executable}, which was to ask, gave no answer")
        if "error" in answer:
            raise ConnectionError(answer["error"])
        return answer

    def cancel(self) -> None:
        """End it; from any thread."""
        with self._lock:
            self._is_cancelled = True
            if self._pid:
                try:
                    os.kill(self._pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # see _blocking_reap

    def _blocking_child(self, request: bytes) -> bytes:
        """Return what the child prints."""
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        folder, name = os.path.split(package)
        # Not for `site`: its folders may hold much, and the child needs none of it.
        flags = ("-S", "-E") if sys.flags.ignore_environment else ("-S",)
        arguments = [sys.executable, *flags, "-c", _CODE.format(name), folder]
        open_fds: list[int] = []
        pid = 0

        def close(*fds: int) -> None:
            for fd in fds:
                open_fds.remove(fd)
                os.close(fd)

        try:
            open_fds += os.pipe()
            open_fds += os.pipe()
            child_input, requests, answers, child_output = open_fds
            with self._lock:
                if self._is_cancelled:
                    return b""
                pid = self._pid = os.posix_spawn(
                    sys.executable,
                    arguments,
                    os.environ,
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, child_input, 0),
                        (os.POSIX_SPAWN_DUP2, child_output, 1),
                    ],
                    setpgroup=0,  # the terminal's Ctrl-C is for the client alone
                )
            close(child_input, child_output)
            try:
                os.write(requests, request + b"\n")  # a pipe takes 64 KiB at once
            except BrokenPipeError:
                pass  # it couldn't even start
            return _blocking_read(answers)
        finally:
            close(*open_fds)
            if pid:
                self._blocking_reap(pid)

    def _blocking_reap(self, pid: int) -> None:
        """Let nothing be left of the child, which has said all, or had its time."""
        self.cancel()
        try:
            # It can be killed until it is reaped; from then on another process may have its id.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                self._pid = 0
                os.waitpid(pid, 0)
        except ChildProcessError:  # the program around reaps all children by itself
            self._pid = 0


def _blocking_read(fd: int) -> bytes:
    """Return all that comes from a pipe until its end. Raises ConnectionError."""
    data, deadline = bytearray(), time.monotonic() + LONGEST_S
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while len(data) <= PRINTED_BYTES:
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ConnectionError(f"no answer within {LONGEST_S:g} s")
        piece = os.read(fd, 65536)
        if not piece:
            return bytes(data)
        data += piece
    raise ConnectionError(f"an answer of more than {ANSWER_BYTES} bytes")


def _blocking_answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request, or its `error`."""
    from .https import blocking_request, parse_url  # noqa: PLC0415
    from .proxy import parse_proxy  # noqa: PLC0415

    proxy, password = request["proxy"], request["proxy_password"]
    try:
        answer = blocking_request(
            parse_url(request["url"], request["option"]),
            request["path"],
            method="POST",
            headers=request["headers"],
            body=request["body"].encode(),
            ca_file=request["ca_file"],
            proxy=parse_proxy(proxy, password) if proxy else None,
            timeout_s=REQUEST_S,
            limit_bytes=ANSWER_BYTES,
        )
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {
        "status": answer.status,
        "retry_after": answer.headers.get("retry-after", ""),
        "body": answer.body.decode("utf-8", "replace"),
    }


def main() -> None:
    """The child: a line of standard input is the request, standard output gets the answer."""
    import json  # noqa: PLC0415

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_blocking_end, daemon=True).start()
    sys.stdout.write(json.dumps(_blocking_answer(request)))


def _blocking_end() -> None:
    """End this process when standard input ends: the client has gone, nobody waits any more."""
    os.read(0, 1)
    os._exit(1)

"""The published snitun releases, each in an environment of its own, as relay and as client."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import PROJECT, Credentials, Endpoint, Program, free_port
from tools import environment

PEER = Path(__file__).with_name("snitun_peer.py")
FOLDER = Path(os.environ.get("PUBLISHED_PEERS") or PROJECT / ".cache" / "snitun-peers")
# Release → the Python that it runs on.
RELEASES = {"0.39.1": "3.11", "0.40.0": "3.11", "0.47.0": "3.13"}
NEWEST = "0.47.0"


def missing(what: str) -> None:
    """Skip the test because `what` is missing here; under CI=true, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI skips nothing")
    pytest.skip(f"{what} is missing")


def prepare(release: str) -> str | None:
    """Return a Python that has this release, made where there is none yet; None if it can't."""
    return environment.python_with_snitun(FOLDER, release, RELEASES[release])


@functools.cache
def python_with_snitun(release: str) -> str:
    """Return a Python that has this release; skip the test where it can't be made."""
    python = prepare(release)
    if python is None:
        missing(f"Python {RELEASES[release]}, on which snitun {release} runs,")
    assert python is not None
    return python


def _start(release: str, role: str, config: dict[str, Any]) -> Program:
    with tempfile.TemporaryFile("w+") as file:
        json.dump(config, file)
        file.flush()
        file.seek(0)
        program = Program(
            python_with_snitun(release), PEER, role, stdin=file, env={"PYTHONPATH": ""}
        )
    program.wait_for("READY")
    return program


def published_relay(release: str, credentials: Credentials) -> tuple[Program, int]:
    """Start a published relay; return it and its port. The ticket names it from now on."""
    port = free_port()
    config = {"fernet_key": credentials.fernet_key, "host": ["127.0.0.1", "::1"], "port": port}
    program = _start(release, "server", config)
    credentials.at(f"127.0.0.1:{port}")
    return program, port


def published_client(
    release: str, credentials: Credentials, port: int, endpoint: Endpoint, host: str = "127.0.0.1"
) -> Program:
    """Start a published client of the relay at `port`; return it once it is connected."""
    payload = credentials.payload
    return _start(
        release,
        "client",
        {
            "host": host,
            "port": port,
            "endpoint_host": "127.0.0.1",
            "endpoint_port": endpoint.port,
            "token": credentials.token,
            "aes_key": payload.aes_key.hex(),
            "aes_iv": payload.aes_iv.hex(),
            "protocol_version": payload.protocol_version,
            "cipher": payload.cipher,
        },
    )

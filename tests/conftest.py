"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from snitun_sync.protocol.aes import BACKENDS, Aes, load
from tests.support import Credentials, Endpoint


@pytest.fixture(params=BACKENDS)
def aes(request: pytest.FixtureRequest) -> Aes:
    """Each crypto package in turn."""
    return load(request.param)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """An endpoint on 127.0.0.1."""
    service = Endpoint()
    yield service
    service.close()


@pytest.fixture
def credentials(tmp_path: Path) -> Credentials:
    """A key and a ticket, version 2 with aes-cbc."""
    return Credentials(tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the project's own options."""
    parser.addoption("--long", action="store_true", help="stalls of a minute, takeovers for five")


def pytest_configure(config: pytest.Config) -> None:
    """No test fails because the machine is slow, nor because of what the caller's shell holds."""
    hypothesis.settings.register_profile("project", deadline=None)
    hypothesis.settings.load_profile("project")
    for name in ("SNITUN_TOKEN", "SNITUN_CRYPTO"):
        os.environ.pop(name, None)

"""Fixtures that all tests share, and what holds for every test run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from snitun_sync.protocol import aes as aes_module
from snitun_sync.protocol.aes import BACKENDS, Aes, load
from tests.support import Credentials, Endpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the project's own options."""
    parser.addoption("--long", action="store_true", help="stalls of a minute")
    parser.addoption("--crypto", choices=BACKENDS, help="the crypto package for all programs")


def pytest_configure(config: pytest.Config) -> None:
    """No test fails because the machine is slow, nor because of what the caller's shell holds."""
    hypothesis.settings.register_profile("project", deadline=None)
    hypothesis.settings.load_profile("project")
    for name in tuple(os.environ):
        ours = ("JOURNAL_STREAM", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY")
        if name.startswith("SNITUN_") or name in ours:
            del os.environ[name]
    # Where it is ignored, as in the background of a script, all that is started ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    crypto = config.getoption("--crypto")
    if crypto:
        os.environ["SNITUN_CRYPTO"] = crypto
        aes_module._loaded[""] = load(crypto)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing is skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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

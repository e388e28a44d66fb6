"""The pages have every option, field, metric and exit code; the examples of settings count."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from snitun_sync import program, status_command
from snitun_sync.client import cli
from snitun_sync.master import cli as master
from snitun_sync.master.keys import Keys
from snitun_sync.master.metrics import exposition
from snitun_sync.master.store import Store
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.token import new_fernet_key
from tests.services import Services
from tests.support import PROJECT, Credentials, Program, examples, module

TEXT = (PROJECT / "docs" / "client.md").read_text("utf-8")
MASTER = (PROJECT / "docs" / "master.md").read_text("utf-8")
INI = [text for text in examples("docs/endpoints.md") if text.startswith("[client]")]
assert len(INI) == 5


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the names of all options, those of its commands as well."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        yield from (name for name in action.option_strings if name.startswith("--"))


def keys(report: Any) -> Iterator[str]:
    """Yield the names of all fields but those that are data themselves."""
    if isinstance(report, dict):
        for name, value in report.items():
            yield name
            if name not in ("failures", "refused_channels"):
                yield from keys(value)
    elif isinstance(report, list):
        for value in report:
            yield from keys(value)


@pytest.mark.parametrize("parser", [cli.parser(), status_command.parser("snitun-client")])
def test_every_option(parser: argparse.ArgumentParser) -> None:
    for name in set(options(parser)) - {"--help", "--version"}:
        assert f"`{name}" in TEXT, name


def test_every_field_and_metric(tmp_path: Path) -> None:
    with Services(tmp_path) as services, services.device("ECHO") as device:
        device.exchange()
        report = services.client.report()
        for name in set(keys(report)):
            assert f"`{name}`" in TEXT, name
        for family in services.client.metrics():
            suffix = {"counter": "_total", "info": "_info"}.get(family[1], "")
            assert f"`{family[0]}{suffix}" in TEXT, family[0]


def test_every_option_command_and_metric_of_the_master(tmp_path: Path) -> None:
    parser = master.parser()
    for name in set(options(parser)) - {"--help", "--version"}:
        assert f"`{name}`" in MASTER, name
    for name in commands(parser):
        assert f"`{name}" in MASTER or f"snitun-master {name}" in MASTER, name
    with Store(str(tmp_path / "database")) as store:
        (tmp_path / "keys").write_text(new_fernet_key(os.urandom))
        keys = Keys(str(tmp_path / "keys"), "--fernet-key-file", load())
        text = exposition(store, {("/healthz", 200): 1}, 0, keys)
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    names = {sample.name for family in families for sample in family.samples}
    assert "snitun_master_answers_total" in names
    for name in names:
        assert re.search(rf"`{name}[`{{]", MASTER), name


def commands(parser: argparse.ArgumentParser, before: str = "") -> Iterator[str]:
    """Yield the commands, such as `device add`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found = list(commands(command, f"{before}{name} "))
                yield from found or [before + name]


def test_every_exit_code() -> None:
    codes = {value for name, value in vars(program).items() if name.startswith("EXIT_")}
    # A session master has nobody to be refused by, and doesn't know whether it is ready.
    for text, expected in ((TEXT, codes), (MASTER, codes - {1, 77})):
        assert set(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE))) == expected


@pytest.mark.parametrize("text", INI, ids=lambda text: text.splitlines()[2])
def test_every_example_of_settings(text: str, tmp_path: Path) -> None:
    text = text.replace("/etc/snitun/tls", str(tmp_path))
    pem = trustme.CA().issue_cert("home.example.com").private_key_and_cert_chain_pem.bytes()
    for name in re.findall(rf"^tls-(?:cert|key) = {tmp_path}/(\S+)", text, re.MULTILINE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pem)
    (tmp_path / "snitun.ini").write_text(text)
    ticket = Credentials(tmp_path).ticket_file
    arguments = ("--check", "--token-file", ticket, "--config", tmp_path / "snitun.ini")
    with Program(*module("snitun_sync.client", *arguments)) as client:
        assert client.wait() == 0, client.output

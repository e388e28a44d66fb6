"""Imports run one way: protocol <- net <- client, server, master; and what they bring along."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import PROJECT

PACKAGE = PROJECT / "snitun_sync"
FILES = sorted(PACKAGE.rglob("*.py"))
# What each layer may import of ours; "" is the top level: errors, options, the version.
ALLOWED = {
    "protocol": {"errors", "protocol"},
    "net": {"errors", "protocol", "net", "__init__"},
    "client": {
        *("errors", "protocol", "net", "client", "options", "program", "status_command", "tls"),
    },
    "server": {"errors", "protocol", "net", "server", "options", "program", "status_command"},
    "master": {
        *("errors", "protocol", "net", "master", "options", "program", "tls", "__init__"),
    },
    "errors": set(),
    "tls": {"errors", "net", "program"},
    "__init__": set(),
    "logs": set(),
    "program": {"errors", "protocol", "logs", "status_command"},
    "status_command": {"errors", "protocol", "net", "options", "program"},
    "options": {"errors", "protocol", "logs", "program", "__init__"},
}
NOT_IN_PROTOCOL = {"socket", "selectors", "threading", "time", "logging", "os", "asyncio"}
CRYPTO = {"Crypto", "Cryptodome", "cryptography"}


def is_for_typing(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, but for what only type checkers see."""
    for child in ast.iter_child_nodes(tree):
        if not is_for_typing(child):
            yield child
            yield from nodes(child)


def imports(path: Path) -> Iterator[str]:
    """Return the full names of the modules that the file imports when it runs."""
    package = ("snitun_sync", *path.relative_to(PACKAGE).parts[:-1])
    for node in nodes(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def test_the_checker_sees_relative_and_nested_imports() -> None:
    found = set(imports(PACKAGE / "net" / "tunnel.py"))
    assert "snitun_sync.protocol.mux.Mux" in found
    assert "snitun_sync.net.bridge.Bridge" in found
    assert "hashlib" in set(imports(PACKAGE / "protocol" / "aes.py"))  # inside a method


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    allowed = ALLOWED[layer(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "snitun_sync":
            target = parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "__init__"
            assert target in allowed, f"{path} imports {name}"
            continue
        if sys.version_info >= (3, 10):
            assert parts[0] in sys.stdlib_module_names, f"{path} imports {name}"
        assert parts[0] != "asyncio"
        if layer(path) == "protocol":
            assert parts[0] not in NOT_IN_PROTOCOL, f"{path} imports {name}"


def test_only_aes_knows_the_crypto_package() -> None:
    for path in FILES:
        if path.name == "aes.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.value] if isinstance(node, ast.Constant) else []
            assert not any(isinstance(n, str) and n in CRYPTO - {"cryptography"} for n in names), (
                path
            )


def test_input_is_never_checked_by_assert_in_the_protocol() -> None:
    for path in sorted((PACKAGE / "protocol").glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)], path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("snitun_sync", {"snitun_sync.client", "snitun_sync.server", "socket"}),
        (
            "snitun_sync.client",
            {"asyncio", "ssl", "hashlib", "json", "typing", "snitun_sync.server"},
        ),
        (
            "snitun_sync.client.cli",
            {"asyncio", "ssl", "hashlib", "json", "cffi", "Crypto", "configparser", "difflib"},
        ),
        ("snitun_sync.client.master", {"asyncio", "ssl", "http", "email", "hashlib", "json"}),
        ("snitun_sync.net.fetch", {"asyncio", "ssl", "http", "json", "subprocess", "logging"}),
        ("snitun_sync.client.access", {"asyncio", "ssl", "ipaddress", "snitun_sync.options"}),
        ("snitun_sync.net.https", {"asyncio", "ssl", "http", "email", "json", "hashlib"}),
        ("snitun_sync.server.cli", {"asyncio", "ssl", "snitun_sync.client", "snitun_sync.master"}),
        ("snitun_sync.master.cli", {"asyncio", "ssl", "socket", "sqlite3", "snitun_sync.net"}),
    ],
)
def test_what_an_import_brings_into_memory(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    loaded = set(printed.stdout.split())
    # What this Python loads by itself, for its own site, is nobody's doing.
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not (absent - set(bare.stdout.split())) & loaded


def test_firmware_may_take_a_part(tmp_path: Path) -> None:
    """The client runs without relay and session master, as README says."""
    readme = (PROJECT / "README.md").read_text("utf-8")
    [text] = re.findall(r"A client needs only (.+?) of it\.", readme, re.DOTALL)
    for name in re.findall(r"`(\S+?)/?`", text):
        source, target = PACKAGE / name, tmp_path / "snitun_sync" / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    command = [sys.executable, "-m", "snitun_sync.client", "--token", "-"]
    done = subprocess.run(
        command, cwd=tmp_path, input="{}", capture_output=True, text=True, check=False
    )
    assert done.returncode == 78, done.stderr
    assert "the ticket's server is missing" in done.stderr


def test_asserts_count_under_any_flag() -> None:
    """Under python -O a plain assert would do nothing; pytest's are of another kind."""
    from tests.support import wait_until

    with pytest.raises(AssertionError):
        assert PACKAGE is None
    with pytest.raises(AssertionError):
        wait_until(lambda: False, timeout_s=0)

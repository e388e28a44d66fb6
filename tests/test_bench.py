"""The benchmark: its report, its picture and its command line. Nothing is measured here."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tools import bench, bench_report
from tools.bench_scenarios import SCENARIOS
from tools.bench_systems import SYSTEMS

RESULT: bench_report.Result = {
    "machine": "2 cores",
    "rounds": 3,
    "base": "snitun-0.47.0",
    "skipped": ["dropbear (dropbear is missing)"],
    "systems": {
        "snitun_sync": {
            "download-1": {"MiB/s": 850.0, "relay CPU s/GiB": 0.5, "client CPU s/GiB": 1.0},
            "mixed": {"p50 ms": 5.0, "p99 ms": 20.0, "MiB/s": 800.0},
            "channels/1": {"relay KiB/channel": 0.0, "per s": 5000.0},
            "channels/1000": {"relay KiB/channel": 0.84, "per s": 25000.0},
        },
        "snitun-0.47.0": {
            "download-1": {"MiB/s": 85.0, "relay CPU s/GiB": 8.0, "client CPU s/GiB": 10.0},
            "mixed": {"p50 ms": 50.0, "p99 ms": 100.0, "MiB/s": 130.0},
        },
        "snitun-0.39.1": {"download-1": {"MiB/s": 42.5}, "mixed": None},
        "haproxy-sni": {"download-1": {"MiB/s": 1000.0, "relay CPU s/GiB": 1.0}},
    },
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(RESULT), "utf-8")
    return path


def test_report_from_saved_figures(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.md"
    assert bench.main(["--from-json", str(saved), "--markdown", str(file)]) == 0
    lines = file.read_text("utf-8").splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    for line in (
        "### download-1",
        "| system | MiB/s | relay CPU s/GiB | client CPU s/GiB |",
        "| snitun_sync | 850 (10.00×) | 0.5 (0.06×) | 1 (0.10×) |",
        "| snitun-0.47.0 | 85 | 8 | 10 |",
        "| snitun-0.39.1 | 42.5 (0.50×) | - | - |",
        "| haproxy-sni | 1,000 (11.76×) | 1 (0.12×) | - |",
        "| snitun-0.39.1 | failed | failed | failed |",
        "| snitun_sync | 1,000 | 0.84 | 25,000 |",
        "Skipped: dropbear (dropbear is missing).",
    ):
        assert line in lines
    assert "### upload-1" not in lines


def test_another_base(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--from-json", str(saved), "--base", "snitun_sync"]) == 0
    assert "| snitun-0.47.0 | 85 (0.10×) | 8 (16.00×) | 10 (10.00×) |" in capsys.readouterr().out


def test_a_rate_is_better_higher_and_a_cost_lower() -> None:
    mains = {scenario.main for scenario in SCENARIOS.values() if scenario.main}
    better_higher = {figure for figure in mains if bench_report.is_better_higher(figure)}
    assert better_higher == {"MiB/s", "per s"}


@pytest.mark.filterwarnings("default")  # what matplotlib's own imports warn of
def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, again = tmp_path / "picture.svg", tmp_path / "again.svg"
    bench_report.picture(RESULT, path)
    bench_report.picture(RESULT, again)
    assert path.read_bytes() == again.read_bytes()
    root = ET.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {"".join(element.itertext()).strip() for element in root.iter()}
    assert {*RESULT["systems"], "download-1, MiB/s", "mixed, p50 ms", "failed"} <= texts


@pytest.mark.filterwarnings("default")
def test_no_picture_without_a_base(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result: bench_report.Result = {**RESULT, "base": "openssh"}
    with pytest.raises(ValueError, match="openssh"):
        bench_report.picture(result, tmp_path / "picture.svg")


@pytest.mark.parametrize(
    ("option", "name", "known"),
    [
        ("--systems", "snitun_sync,telnet", SYSTEMS),
        ("--scenarios", "memory,telnet", SCENARIOS),
        ("--base", "telnet", SYSTEMS),
    ],
)
def test_unknown_names(
    option: str, name: str, known: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main([option, name])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "'telnet'" in said
    assert all(each in said for each in known)


def test_list_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    listed = capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    explained = capsys.readouterr().out
    for name in (*SYSTEMS, *SCENARIOS):
        assert f"  {name} " in listed
        assert f"  {name} " in explained

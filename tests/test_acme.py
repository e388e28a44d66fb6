"""A certificate by ACME through the tunnel: lego on the appliance, pebble as the authority."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.acme import renewed_in_use

if TYPE_CHECKING:
    from pathlib import Path


def test_a_certificate_is_issued_and_renewed_while_the_page_is_used(tmp_path: Path) -> None:
    outcome = renewed_in_use(tmp_path, renewals=1, pause_s=0.05, devices=4)
    assert outcome.certificates == 2
    assert outcome.requests >= 4

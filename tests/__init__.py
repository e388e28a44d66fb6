"""Tests of snitun_sync; they mirror its layout."""

import pytest

# Asserts in helpers count, also under python -O.
pytest.register_assert_rewrite("tests.support", "tests.services", "tests.interop.peers")

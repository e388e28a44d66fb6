"""The relay: `python -m snitun_sync.server`, or `Server` inside another program."""

from .server import Server

__all__ = ["Server"]

"""The SniTun protocol without I/O: bytes in, meaning out.

Nothing here imports socket, selectors, threading, time, logging or reads the
environment: time and randomness are arguments.
"""

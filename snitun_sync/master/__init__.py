"""The session master: makes the Fernet keys and the tickets that client and relay trust."""

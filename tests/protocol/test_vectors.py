"""Recorded transcripts of published releases are read, and written again, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snitun_sync.protocol import frame
from snitun_sync.protocol.aes import BACKENDS, Aes, load
from snitun_sync.protocol.cipher import UnitCipher, unit_cipher
from snitun_sync.protocol.handshake import ClientHandshake, Handshake, RelayHandshake
from snitun_sync.protocol.mux import Channel, Mux
from snitun_sync.protocol.token import Fernet, Payload, TokenReader

if TYPE_CHECKING:
    from snitun_sync.protocol.mux import Buffer

FILES = sorted((Path(__file__).parent.parent / "vectors").glob("*.json"))
# pycryptodome has no AES-GCM-SIV
CASES = [
    (path, backend)
    for path in FILES
    for backend in BACKENDS
    if backend != "pycryptodome" or not path.stem.endswith("siv")
]


class Transcript:
    """One recorded connection."""

    def __init__(self, path: Path) -> None:
        fields = json.loads(path.read_text("utf-8"))
        self.fields: dict[str, Any] = fields
        self.version, self.cipher = fields["protocol_version"], fields["cipher"]
        self.token = fields["token"].encode()
        self.challenge = bytes.fromhex(fields["challenge"])
        self.response = bytes.fromhex(fields["response"])
        self.to_server = bytes.fromhex(fields["client_to_server"])
        self.to_client = bytes.fromhex(fields["server_to_client"])
        assert self.to_server.startswith(self.token)

    def frames(self, side: str) -> list[tuple[bytes, int, bytes, bytes]]:
        """Return (id, flow, extra, data) of all frames that `side` sent."""
        return [
            (bytes.fromhex(f["id"]), f["flow"], bytes.fromhex(f["extra"]), bytes.fromhex(f["data"]))
            for f in self.fields[f"{side}_frames"]
        ]

    def unit_cipher(self, aes: Aes, *, is_relay: bool) -> UnitCipher:
        return unit_cipher(
            self.cipher,
            aes,
            bytes.fromhex(self.fields["aes_key"]),
            bytes.fromhex(self.fields["aes_iv"]),
            is_relay=is_relay,
            random=bytes,
        )


class Script:
    """Randomness that gives back what the recorded side drew."""

    def __init__(self) -> None:
        self.next: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        value = self.next.pop(0)
        assert len(value) == size
        return value


class Recorder:
    """Events and Receiver in one: what a mux says it has received."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def output_ready(self) -> None:
        pass

    def channel_opened(self, channel: Channel, address: bytes) -> None:
        self.seen.append(("new", channel.id, address))
        channel.receiver = ChannelRecorder(self, channel)

    def pong_received(self, ping_id: bytes) -> None:
        self.seen.append(("pong", ping_id))

    def goaway_received(self, address: bytes, extra: bytes) -> None:
        raise AssertionError("no release sends this")


class ChannelRecorder:
    """The receiver of one channel."""

    def __init__(self, log: Recorder, channel: Channel) -> None:
        self.log, self.channel = log, channel

    def data_received(self, payload: memoryview) -> None:
        seen = self.log.seen
        if seen and seen[-1][:2] == ("data", self.channel.id):
            seen[-1] = (*seen[-1][:2], seen[-1][2] + bytes(payload))
        else:
            seen.append(("data", self.channel.id, bytes(payload)))

    def take_turn(self) -> None:
        raise AssertionError("nobody waits")

    def pause_changed(self) -> None:
        self.log.seen.append(("pause" if self.channel.is_paused else "resume", self.channel.id))

    def channel_ended(self, *, by_peer: bool) -> None:
        assert by_peer
        self.log.seen.append(("close", self.channel.id))


def expected(frames: list[tuple[bytes, int, bytes, bytes]], version: int) -> list[tuple[Any, ...]]:
    """Return what a Recorder must see of these frames; neighbouring DATA counts as one."""
    seen: list[tuple[Any, ...]] = []
    for channel_id, flow, extra, data in frames:
        if flow == frame.NEW:
            source = data if version >= 2 else extra
            seen.append(("new", channel_id, frame.unpack_address(source)))
        elif flow == frame.DATA and seen and seen[-1][:2] == ("data", channel_id):
            seen[-1] = (*seen[-1][:2], seen[-1][2] + data)
        elif flow == frame.DATA:
            seen.append(("data", channel_id, data))
        elif flow == frame.CLOSE:
            seen.append(("close", channel_id))
        elif flow == frame.PING and extra.startswith(b"pong"):
            seen.append(("pong", channel_id))
        elif flow in (frame.PAUSE, frame.RESUME):
            seen.append(("pause" if flow == frame.PAUSE else "resume", channel_id))
    return seen


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut `data` at these positions."""
    edges = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:])]


def decode(transcript: Transcript, aes: Aes, *, is_relay: bool, pieces: list[bytes]) -> None:
    """Read one direction as the side that received it did, and compare with the record."""
    cipher = transcript.unit_cipher(aes, is_relay=is_relay)
    handshake: Handshake
    if is_relay:
        handshake = RelayHandshake(cipher, aes, bytes)
        handshake._challenge = transcript.challenge
    else:
        handshake = ClientHandshake(cipher, aes, transcript.token.decode())
        assert handshake.first() == transcript.token
    recorder = Recorder()
    mux = Mux(cipher, transcript.version, recorder, is_relay=is_relay, random=bytes)
    if is_relay:  # the channels that it had opened, under the ids that it had drawn
        for channel_id, flow, _, _ in transcript.frames("server"):
            if flow == frame.NEW:
                channel = mux.channels[channel_id] = Channel(channel_id)
                channel.receiver = ChannelRecorder(recorder, channel)
    for piece in pieces:
        if not handshake.is_done:
            handshake.receive(piece)
            piece = handshake.rest
        mux.receive(memoryview(piece))
    side = "client" if is_relay else "server"
    assert recorder.seen == expected(transcript.frames(side), transcript.version)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].stem}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Path, str]:
    found: tuple[Path, str] = request.param
    return found


@pytest.fixture
def transcript(case: tuple[Path, str]) -> Transcript:
    return Transcript(case[0])


@pytest.fixture
def aes(case: tuple[Path, str]) -> Aes:
    return load(case[1])


@pytest.fixture(params=[True, False], ids=["relay", "client"])
def is_relay(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def received_by(transcript: Transcript, is_relay: bool) -> bytes:
    return transcript.to_server[len(transcript.token) :] if is_relay else transcript.to_client


def test_there_are_transcripts_of_all_ciphers_and_versions() -> None:
    found = {(t.version, t.cipher) for t in map(Transcript, FILES)}
    assert {(0, "aes-cbc"), (1, "aes-cbc"), (1, "aes-gcm"), (2, "aes-gcm-siv")} <= found


def test_decoded_whole(transcript: Transcript, aes: Aes, is_relay: bool) -> None:
    data = received_by(transcript, is_relay)
    decode(transcript, aes, is_relay=is_relay, pieces=[data])


def test_decoded_byte_by_byte(transcript: Transcript, aes: Aes, is_relay: bool) -> None:
    data = received_by(transcript, is_relay)
    pieces = [data[at : at + 1] for at in range(len(data))]
    decode(transcript, aes, is_relay=is_relay, pieces=pieces)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 2**32), max_size=40))
def test_decoded_at_random_cuts(
    transcript: Transcript, aes: Aes, is_relay: bool, cuts: list[int]
) -> None:
    data = received_by(transcript, is_relay)
    decode(transcript, aes, is_relay=is_relay, pieces=pieces_of(data, cuts))


def test_every_header_field_is_read(transcript: Transcript, aes: Aes, is_relay: bool) -> None:
    cipher = transcript.unit_cipher(aes, is_relay=is_relay)
    data, at = received_by(transcript, is_relay), 32 + cipher.overhead
    hello = cipher.open(data[:at])
    assert hello == (transcript.response if is_relay else transcript.challenge)
    for channel_id, flow, extra, payload in transcript.frames("client" if is_relay else "server"):
        end = at + 32 + cipher.overhead
        header = frame.HEADER.unpack(cipher.open(data[at:end]))
        assert header == (channel_id, flow, len(payload), extra)
        at = end
        if flow == frame.NEW and payload:
            at += len(payload) + cipher.overhead
            assert cipher.open(data[end:at]) == payload
        else:
            at += len(payload)
            assert data[end:at] == payload
    assert at == len(data)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case[0].stem.endswith("siv")],
    ids=lambda case: case[0].stem,
)
def test_encoded_to_the_same_bytes(transcript: Transcript, aes: Aes, is_relay: bool) -> None:
    # (aes-gcm-siv has random nonces)
    script = Script()
    cipher = transcript.unit_cipher(aes, is_relay=is_relay)
    # What this side had sent is what the other one received.
    wanted = received_by(transcript, not is_relay)
    sent: list[Buffer] = [*cipher.seal([transcript.challenge if is_relay else transcript.response])]
    mux = Mux(cipher, transcript.version, Recorder(), is_relay=is_relay, random=script)
    for channel_id, flow, extra, data in transcript.frames("server" if is_relay else "client"):
        channel = mux.channels.get(channel_id) or Channel(channel_id)
        if flow == frame.NEW:
            address = frame.unpack_address(data or extra)
            assert address is not None
            prefix = 1 + len(address)
            script.next = [channel_id, data[prefix:], extra] if data else [channel_id, extra[5:]]
            mux.open(address)
        elif flow == frame.DATA:
            script.next = [extra]
            mux.send(channel, data)
        elif flow == frame.PING and extra.startswith(b"ping"):
            script.next = [channel_id, extra[4:]]
            mux.ping()
        elif flow == frame.PING:
            script.next = [extra[4:]]
            mux._ping_received(channel_id, b"ping")
        else:
            script.next = [extra]
            {frame.CLOSE: mux.abort, frame.PAUSE: mux.pause, frame.RESUME: mux.resume}[flow](
                channel
            )
        sent += mux.data_to_send()
    assert b"".join(sent) == wanted


def test_token(transcript: Transcript, aes: Aes) -> None:
    fields = transcript.fields
    reader = TokenReader(Fernet([fields["fernet_key"]], aes))
    answers = [reader.receive(transcript.token[at : at + 1]) for at in range(len(transcript.token))]
    assert not any(answers[:-1])
    assert answers[-1] is not None
    payload = Payload.from_json(answers[-1])
    assert payload.names == (fields["hostname"], *fields["alias"])
    assert (payload.valid, payload.cipher) == (fields["valid"], fields["cipher"])
    assert payload.protocol_version == fields["protocol_version"]
    assert payload.aes_key.hex() == fields["aes_key"]
    assert payload.aes_iv.hex() == fields["aes_iv"]


def test_handshake(transcript: Transcript, aes: Aes) -> None:
    client = ClientHandshake(transcript.unit_cipher(aes, is_relay=False), aes, "gA")
    size = client.unit_size
    answer = client.receive(transcript.to_client[:size])
    if transcript.cipher != "aes-gcm-siv":
        start = len(transcript.token)
        assert answer == transcript.to_server[start : start + size]
    relay_cipher = transcript.unit_cipher(aes, is_relay=True)
    relay = RelayHandshake(relay_cipher, aes, bytes)
    relay._challenge = transcript.challenge
    assert relay.receive(answer + b"frames") == b""
    assert relay.is_done
    assert relay.rest == b"frames"

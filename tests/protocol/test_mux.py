"""The multiplexer, in pairs, without sockets."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snitun_sync.errors import AuthenticationError, SniTunError, ViolationError
from snitun_sync.protocol import frame
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.cipher import CIPHERS, UnitCipher, unit_cipher
from snitun_sync.protocol.mux import (
    CONFIRM_BYTES,
    FENCE_BYTES,
    FENCE_ROUNDS,
    OLD_TURN_BYTES,
    Channel,
    ChannelState,
    Mux,
)

KEY, IV = bytes(32), bytes(16)
ADDRESS = bytes([192, 0, 2, 7])
ADDRESS_6 = bytes.fromhex("20010db8000000000000000000000007")


class Taker:
    """A channel's receiver that keeps what it gets."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.data = bytearray()
        self.ended: list[bool] = []
        self.pauses: list[bool] = []
        channel.receiver = self

    def data_received(self, payload: memoryview) -> None:
        assert not self.ended
        self.data += payload

    def take_turn(self) -> None:
        raise AssertionError("the tests take turns themselves")

    def pause_changed(self) -> None:
        self.pauses.append(self.channel.is_paused)

    def channel_ended(self, *, by_peer: bool) -> None:
        self.ended.append(by_peer)


class Side:
    """One end of a tunnel."""

    def __init__(
        self, *, is_relay: bool, version: int = 2, cipher: str = "aes-cbc", peer_version: int = -1
    ) -> None:
        aes = load("cryptography")
        self.cipher: UnitCipher = unit_cipher(
            cipher, aes, KEY, IV, is_relay=is_relay, random=os.urandom
        )
        self.mux = Mux(self.cipher, version, self, is_relay=is_relay, random=os.urandom)
        self.opened: list[tuple[Channel, bytes]] = []
        self.pongs: list[bytes] = []
        self.goaways: list[tuple[bytes, bytes]] = []
        self.ready = 0

    def output_ready(self) -> None:
        self.ready += 1

    def channel_opened(self, channel: Channel, address: bytes) -> None:
        self.opened.append((channel, address))
        Taker(channel)

    def pong_received(self, ping_id: bytes) -> None:
        self.pongs.append(ping_id)

    def goaway_received(self, address: bytes, extra: bytes) -> None:
        self.goaways.append((address, extra))

    def output(self) -> bytes:
        return b"".join(self.mux.data_to_send())

    def taker(self, number: int = -1) -> Taker:
        receiver = self.opened[number][0].receiver
        assert isinstance(receiver, Taker)
        return receiver

    def raw(self, channel_id: bytes, flow: int, size: int = 0, extra: bytes = b"") -> bytes:
        """Return a sealed header with whatever in it."""
        return self.cipher.seal(
            [frame.HEADER.pack(channel_id, flow, size, extra.ljust(frame.EXTRA_SIZE, b"\0"))]
        )[0]


class Pair:
    """Relay and client, connected."""

    def __init__(self, version: int = 2, cipher: str = "aes-cbc") -> None:
        self.relay = Side(is_relay=True, version=version, cipher=cipher)
        self.client = Side(is_relay=False, version=version, cipher=cipher)

    def open(self, address: bytes = ADDRESS) -> tuple[Taker, Taker]:
        """Open a channel; return the relay's and the client's end."""
        channel = self.relay.mux.open(address)
        taker = Taker(channel)
        self.exchange()
        return taker, self.client.taker()

    def exchange(self) -> None:
        """Carry bytes to and fro until both are silent."""
        while True:
            to_client, to_relay = self.relay.output(), self.client.output()
            if not to_client and not to_relay:
                return
            self.client.mux.receive(memoryview(to_client))
            self.relay.mux.receive(memoryview(to_relay))


# --- channels ----------------------------------------------------------------------


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("version", [0, 1, 2])
def test_open_send_both_ways_and_close(version: int, cipher: str) -> None:
    pair = Pair(version, cipher)
    relay, client = pair.open()
    assert pair.client.opened[0][1] == ADDRESS
    pair.relay.mux.send(relay.channel, b"from the device")
    pair.client.mux.send(client.channel, b"from the endpoint")
    pair.client.mux.send(client.channel, b"")
    pair.exchange()
    assert (bytes(client.data), bytes(relay.data)) == (b"from the device", b"from the endpoint")
    pair.client.mux.close(client.channel)
    assert client.ended == [False]
    pair.exchange()
    assert relay.ended == [True]
    assert not pair.relay.mux.channels
    assert not pair.client.mux.channels


def test_ipv6_addresses_from_version_2_on() -> None:
    for version, wanted in ((0, bytes(4)), (1, bytes(4)), (2, ADDRESS_6)):
        pair = Pair(version)
        pair.open(ADDRESS_6)
        assert pair.client.opened[0][1] == wanted


def test_addresses_are_private_from_version_2_on() -> None:
    pair = Pair(2, "aes-gcm")
    pair.relay.mux.open(ADDRESS)
    assert ADDRESS not in pair.relay.output()


def test_headers_are_sealed_in_one_go_and_output_is_announced_once() -> None:
    pair = Pair()
    relay, _ = pair.open()
    pair.relay.ready = 0
    for _ in range(50):
        pair.relay.mux.send(relay.channel, b"x")
    assert pair.relay.ready == 1
    assert len(pair.relay.mux.data_to_send()) == 100
    assert pair.relay.mux.data_to_send() == []


def test_data_for_a_closed_or_unknown_channel_is_dropped() -> None:
    pair = Pair()
    relay, client = pair.open()
    pair.relay.mux.send(relay.channel, b"crosses the CLOSE")
    pair.client.mux.close(client.channel)
    pair.exchange()
    assert not client.data
    data = (
        pair.relay.raw(b"?" * 16, frame.DATA, 5) + b"hello" + pair.relay.raw(b"?" * 16, frame.PING)
    )
    pair.client.mux.receive(memoryview(data))
    assert pair.client.output()  # the pong: reading went on behind the payload


def test_a_frame_of_4_gib_passes_in_pieces() -> None:
    pair = Pair()
    _, client = pair.open()
    size = 2**32 - 1
    pair.client.mux.receive(memoryview(pair.relay.raw(client.channel.id, frame.DATA, size)))
    sizes: list[int] = []
    client.data_received = lambda payload: sizes.append(len(payload))  # type: ignore[method-assign]
    buffer = memoryview(bytes(16 * 1024 * 1024))
    for _ in range(256):
        pair.client.mux.receive(buffer[: min(len(buffer), size - sum(sizes))])
    assert sum(sizes) == size
    assert len(sizes) == 256
    pair.client.mux.receive(memoryview(pair.relay.raw(b"p" * 16, frame.PING)))
    assert pair.client.output()


def test_the_rest_of_an_aborted_channel_s_frame_is_dropped() -> None:
    pair = Pair()
    _, client = pair.open()
    pair.client.mux.receive(
        memoryview(pair.relay.raw(client.channel.id, frame.DATA, 100) + b"x" * 60)
    )
    pair.client.mux.abort(client.channel)
    pair.client.mux.receive(memoryview(b"x" * 40 + pair.relay.raw(b"p" * 16, frame.PING)))
    assert len(client.data) == 60
    assert client.ended == [False]
    frames = pair.client.output()
    assert len(frames) == 64  # CLOSE and pong


def test_an_id_may_be_used_again_after_close() -> None:
    pair = Pair(version=0)
    for _ in range(2):
        new = pair.relay.raw(b"i" * 16, frame.NEW, extra=b"4" + ADDRESS)
        close = pair.relay.raw(b"i" * 16, frame.CLOSE)
        pair.client.mux.receive(memoryview(new + close))
    assert len(pair.client.opened) == 2


def test_a_second_new_for_an_open_id_is_a_violation() -> None:
    pair = Pair(version=0)
    new = pair.relay.raw(b"i" * 16, frame.NEW, extra=b"4" + ADDRESS)
    again = pair.relay.raw(b"i" * 16, frame.NEW, extra=b"4" + ADDRESS)
    with pytest.raises(ViolationError, match="which is open"):
        pair.client.mux.receive(memoryview(new + again))


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("payload", [b"5" + bytes(15), b"6" + bytes(15), bytes(16)])
def test_an_address_that_can_t_be_read_is_answered_by_close(cipher: str, payload: bytes) -> None:
    pair = Pair(2, cipher)
    header = frame.HEADER.pack(b"i" * 16, frame.NEW, len(payload), bytes(11))
    pair.client.mux.receive(memoryview(b"".join(pair.relay.cipher.seal([header, payload]))))
    assert not pair.client.opened
    answer = frame.HEADER.unpack(pair.relay.cipher.open(pair.client.output()))
    assert answer[:2] == (b"i" * 16, frame.CLOSE)


def test_an_address_in_extra_that_can_t_be_read_is_answered_by_close() -> None:
    pair = Pair(version=0)
    pair.client.mux.receive(
        memoryview(pair.relay.raw(b"i" * 16, frame.NEW, extra=b"6" + bytes(10)))
    )
    assert not pair.client.opened
    assert pair.client.output()


@pytest.mark.parametrize("size", [17, 272, 2**32 - 1])
def test_a_new_payload_of_absurd_size_is_a_violation(size: int) -> None:
    pair = Pair(2)
    with pytest.raises(ViolationError, match="NEW has a payload"):
        pair.client.mux.receive(memoryview(pair.relay.raw(b"i" * 16, frame.NEW, size)))


@pytest.mark.parametrize("version", [0, 2])
def test_new_from_a_client_is_ignored(version: int) -> None:
    pair = Pair(version)
    pair.client.mux.open(ADDRESS)
    ping_id = pair.client.mux.ping()
    pair.exchange()
    assert not pair.relay.mux.channels
    assert pair.client.pongs == [ping_id]  # its payload was read over


# --- PING --------------------------------------------------------------------------


def test_pings_are_answered_with_their_id() -> None:
    pair = Pair()
    ids = [pair.relay.mux.ping(), pair.relay.mux.ping()]
    pair.exchange()
    assert pair.relay.pongs == ids


def test_whatever_doesn_t_start_with_pong_is_a_ping_and_so_is_0x05() -> None:
    pair = Pair()
    for flow, extra in ((frame.PING, b"hello"), (frame.PING_OLD, b"ping")):
        pair.client.mux.receive(memoryview(pair.relay.raw(b"p" * 16, flow, extra=extra)))
        answer = frame.HEADER.unpack(pair.relay.cipher.open(pair.client.output()))
        assert answer[:3] == (b"p" * 16, frame.PING, 0)
        assert answer[3].startswith(b"pong")


def test_unknown_flows_are_skipped_with_their_payload() -> None:
    pair = Pair()
    data = (
        pair.relay.raw(b"i" * 16, 0x7F, 1000) + b"x" * 1000 + pair.relay.raw(b"p" * 16, frame.PING)
    )
    pair.client.mux.receive(memoryview(data))
    assert len(pair.client.output()) == 32


def test_go_away_is_for_clients_that_know_it() -> None:
    pair = Pair()
    pair.relay.mux.go_away(frame.STOPPING)
    pair.client.mux.ping()
    pair.exchange()
    assert not pair.client.goaways
    pair.client.mux.ping(frame.EXTRA_PING_GOAWAY)
    pair.exchange()
    pair.relay.mux.go_away(frame.TAKEN_OVER + b"\x12\x34", ADDRESS_6)
    pair.client.mux.go_away(frame.STOPPING)  # no business of a client's
    pair.exchange()
    [(address, extra)] = pair.client.goaways
    assert (address, extra[:6]) == (ADDRESS_6, b"over\x12\x34")
    assert not pair.relay.goaways


# --- flow control and the end --------------------------------------------------------


def test_pause_and_resume() -> None:
    pair = Pair(1)
    relay, client = pair.open()
    pair.relay.mux.pause(relay.channel)
    pair.exchange()
    assert client.channel.is_paused
    pair.relay.mux.resume(relay.channel)
    pair.exchange()
    assert client.pauses == [True, False]
    assert not relay.pauses


def test_no_pause_in_version_0() -> None:
    assert not Pair(0).client.mux.can_pause
    assert Pair(1).client.mux.can_pause


def test_a_relay_that_ignores_version_2_gets_no_pause_unless_it_sends_one() -> None:
    pair = Pair(2)
    pair.client.mux.receive(
        memoryview(pair.relay.raw(b"i" * 16, frame.NEW, extra=b"4" + ADDRESS + b"random"))
    )
    assert pair.client.opened[0][1] == ADDRESS
    assert not pair.client.mux.can_pause
    pair.client.mux.receive(memoryview(pair.relay.raw(b"i" * 16, frame.PAUSE)))
    assert pair.client.mux.can_pause
    pair.client.mux.receive(memoryview(pair.relay.raw(b"j" * 16, frame.NEW, extra=b"4" + ADDRESS)))
    assert pair.client.mux.can_pause


def test_close_waits_for_resume() -> None:
    pair = Pair(1)
    relay, client = pair.open()
    pair.relay.mux.pause(relay.channel)
    pair.exchange()
    pair.client.mux.close(client.channel)
    pair.relay.mux.send(relay.channel, b"still delivered")
    pair.exchange()
    assert not relay.ended
    assert not client.ended
    assert bytes(client.data) == b"still delivered"
    pair.relay.mux.resume(relay.channel)
    pair.exchange()
    assert relay.ended == [True]
    assert client.ended == [False]


def big_channel(version: int) -> tuple[Pair, Taker, Taker]:
    """Return a pair whose client has just sent enough to need a fence."""
    pair = Pair(version)
    relay, client = pair.open()
    for _ in range(2):
        pair.client.mux.send(client.channel, bytes(FENCE_BYTES // 2 - 16))
    return pair, relay, client


def carry(side: Side, to: Side) -> None:
    """Carry what `side` has to send now, and not what that brings forth."""
    to.mux.receive(memoryview(side.output()))


def test_close_of_a_big_channel_stands_behind_a_fence() -> None:
    pair, relay, client = big_channel(1)
    pair.client.mux.close(client.channel)
    fences = []
    for _ in range(FENCE_ROUNDS):
        assert client.channel.state is ChannelState.FINISHING
        assert not relay.ended
        fences.append(client.channel.fence)
        carry(pair.client, pair.relay)  # PING
        carry(pair.relay, pair.client)  # pong
    assert client.ended == [False]
    carry(pair.client, pair.relay)
    assert relay.ended == [True]
    assert not set(fences) & set(pair.client.pongs)  # a fence's pong is nobody else's


def test_a_pause_that_was_on_its_way_holds_close_back() -> None:
    pair, relay, client = big_channel(2)
    pair.client.mux.close(client.channel)
    pair.relay.mux.pause(relay.channel)
    pair.exchange()
    assert client.channel.state is ChannelState.FINISHING
    assert client.channel.is_paused
    pair.relay.mux.resume(relay.channel)
    pair.exchange()
    assert relay.ended == [True]
    assert len(relay.data) == FENCE_BYTES - 32


def test_resume_alone_doesn_t_open_the_fence() -> None:
    pair, _, client = big_channel(1)
    pair.client.mux.close(client.channel)
    pair.client.mux.receive(memoryview(pair.relay.raw(client.channel.id, frame.PAUSE)))
    pair.client.mux.receive(memoryview(pair.relay.raw(client.channel.id, frame.RESUME)))
    assert client.channel.state is ChannelState.FINISHING


def test_no_fence_for_little_data_nor_in_version_0() -> None:
    pair = Pair(1)
    _, client = pair.open()
    pair.client.mux.send(client.channel, bytes(FENCE_BYTES - 33))
    pair.client.mux.close(client.channel)
    assert client.ended == [False]
    pair, _, client = big_channel(0)
    pair.client.mux.close(client.channel)
    assert client.ended == [False]


def test_abort_and_the_peer_s_close_clear_a_fence() -> None:
    pair, relay, client = big_channel(1)
    pair.client.mux.close(client.channel)
    pair.client.mux.abort(client.channel)
    assert client.ended == [False]
    pair.exchange()
    assert relay.ended == [True]
    pair, relay, client = big_channel(1)
    pair.client.mux.close(client.channel)
    pair.client.output()
    pair.relay.mux.abort(relay.channel)
    pair.exchange()
    assert client.ended == [True]
    assert not pair.client.mux._fences


# --- turns ---------------------------------------------------------------------------


def test_turns_go_round_and_new_ones_go_first() -> None:
    pair = Pair()
    mux = pair.relay.mux
    a, b, c = (mux.open(ADDRESS) for _ in range(3))
    mux.wait_for_turn(a, is_new=True)
    mux.wait_for_turn(b, is_new=True)
    mux.wait_for_turn(b, is_new=True)  # in line already
    assert mux.has_turns
    assert mux.next_turn() is a
    mux.wait_for_turn(a, is_new=False)
    assert mux.next_turn() is b
    mux.wait_for_turn(b, is_new=False)
    mux.wait_for_turn(c, is_new=True)
    assert [mux.next_turn() for _ in range(4)] == [c, a, b, None]
    assert not mux.has_turns


def test_an_ended_channel_loses_its_turn() -> None:
    mux = Pair().relay.mux
    a, b = mux.open(ADDRESS), mux.open(ADDRESS)
    mux.wait_for_turn(a, is_new=True)
    mux.wait_for_turn(b, is_new=True)
    mux.abort(a)
    assert not a.waits_for_turn
    assert list(mux._new_turns) == [b]
    assert mux.next_turn() is b
    assert mux.next_turn() is None


def test_where_both_lines_are_long_each_has_half_of_the_bytes() -> None:
    """However many small exchanges there are, a bulk transfer goes on; and they go before it."""
    mux = Pair().relay.mux
    small, bulk = [mux.open(ADDRESS) for _ in range(10)], mux.open(ADDRESS)
    sent = {"small": 0, "bulk": 0}
    for channel in small:
        mux.wait_for_turn(channel, is_new=True)
    mux.wait_for_turn(bulk, is_new=False)
    first = []
    for _ in range(1000):
        turn = mux.next_turn()
        assert turn is not None
        name, size = ("bulk", OLD_TURN_BYTES) if turn is bulk else ("small", 6000)
        first.append(name)
        sent[name] += size
        mux.send(turn, bytes(size))
        mux.data_to_send()
        mux.wait_for_turn(turn, is_new=turn is not bulk)
    assert first[:10] == ["small"] * 10
    assert 0.9 < sent["bulk"] / sent["small"] < 1.1


# --- in any pieces, and garbage --------------------------------------------------------


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    version=st.sampled_from([0, 1, 2]),
    cipher=st.sampled_from(CIPHERS),
)
def test_fuzz_all_that_was_sent_arrives_in_order(seed: int, version: int, cipher: str) -> None:
    """Whatever both sides do, and however bytes are cut, each channel's data arrives in order."""
    pair, dice = Pair(version, cipher), random.Random(seed)
    sent: dict[tuple[bool, bytes], bytearray] = {}
    takers: dict[tuple[bool, bytes], Taker] = {}
    wires = {True: bytearray(), False: bytearray()}
    for _ in range(200):
        is_relay = dice.random() < 0.5
        side = pair.relay if is_relay else pair.client
        channels = list(side.mux.channels.values())
        action = dice.random()
        if is_relay and (action < 0.1 or not channels) and len(channels) < 5:
            channel = side.mux.open(dice.choice((ADDRESS, ADDRESS_6)))
            takers[True, channel.id] = Taker(channel)
        elif channels:
            channel = dice.choice(channels)
            if channel.state is not ChannelState.OPEN:
                pass
            elif action < 0.6:
                data = dice.randbytes(dice.choice((0, 1, 31, 32, 33, 5000)))
                side.mux.send(channel, data)
                sent.setdefault((is_relay, channel.id), bytearray()).extend(data)
            elif action < 0.65:
                side.mux.close(channel)
            elif action < 0.75 and side.mux.can_pause:
                (side.mux.resume if channel.has_paused_peer else side.mux.pause)(channel)
        wires[is_relay] += side.output()
        size = dice.randint(0, len(wires[is_relay]))
        piece = bytes(wires[is_relay][:size])
        del wires[is_relay][:size]
        (pair.client if is_relay else pair.relay).mux.receive(memoryview(piece))
    pair.client.mux.receive(memoryview(wires[True]))
    pair.relay.mux.receive(memoryview(wires[False]))
    pair.exchange()
    for channel, _ in pair.client.opened:
        assert isinstance(channel.receiver, Taker)
        takers[False, channel.id] = channel.receiver
    for (from_relay, channel_id), whole in sent.items():
        taker = takers[not from_relay, channel_id]
        # A side that ended the channel first takes no more.
        assert whole.startswith(taker.data)
        assert taker.data == whole or False in taker.ended


@settings(max_examples=200)
@given(st.binary(max_size=400), st.sampled_from(CIPHERS), st.booleans())
def test_fuzz_garbage_is_read_over_or_raises_a_remote_error(
    noise: bytes, cipher: str, is_relay: bool
) -> None:
    pair = Pair(2, cipher)
    pair.open()
    side = pair.relay if is_relay else pair.client
    try:
        side.mux.receive(memoryview(noise))
    except SniTunError as error:
        assert isinstance(error, (ViolationError, AuthenticationError))


# --- what is on its way ------------------------------------------------------------------


def test_pongs_confirm_what_was_read() -> None:
    pair = Pair()
    relay, _ = pair.open()
    mux = pair.relay.mux
    for _ in range(4):
        mux.send(relay.channel, bytes(CONFIRM_BYTES * 3 // 4))
    assert mux.unconfirmed_bytes == 3 * CONFIRM_BYTES
    pair.exchange()
    assert mux.unconfirmed_bytes == 0
    mux.send(relay.channel, bytes(CONFIRM_BYTES - 1))
    pair.exchange()
    assert mux.unconfirmed_bytes == CONFIRM_BYTES - 1  # no PING yet
    mux.send(relay.channel, b"x")
    pair.exchange()
    assert mux.unconfirmed_bytes == 0
    assert not mux._confirms


def test_asking_more_often_asks_at_once_for_what_waits() -> None:
    """It may be more than the new limit lets be on its way: nothing would be sent, and no PING."""
    pair = Pair()
    relay, _ = pair.open()
    mux = pair.relay.mux
    mux.confirm_each(1000)
    mux.send(relay.channel, bytes(999))
    pair.exchange()
    assert mux.unconfirmed_bytes == 999
    mux.confirm_each(500)
    pair.exchange()
    assert mux.unconfirmed_bytes == 0


def test_a_pong_confirms_all_before_its_ping() -> None:
    """A pong that was lost, or comes in another order, never stops the tunnel."""
    pair = Pair()
    relay, _ = pair.open()
    mux = pair.relay.mux
    pings = []
    for _ in range(3):
        mux.send(relay.channel, bytes(CONFIRM_BYTES))
        pings.append(list(mux._confirms)[-1])
    mux.receive(memoryview(pair.client.raw(pings[1], frame.PING, extra=b"pong")))
    assert mux.unconfirmed_bytes == CONFIRM_BYTES
    mux.receive(memoryview(pair.client.raw(pings[0], frame.PING, extra=b"pong")))
    assert mux.unconfirmed_bytes == CONFIRM_BYTES
    mux.receive(memoryview(pair.client.raw(pings[2], frame.PING, extra=b"pong")))
    assert mux.unconfirmed_bytes == 0


def test_our_own_ping_is_never_answered() -> None:
    """Who sends back what it got would else get the pong that proves a key."""
    pair = Pair()
    ping_id = pair.client.mux.ping()
    with pytest.raises(ViolationError, match="our own PING came back"):
        pair.client.mux.receive(memoryview(pair.relay.raw(ping_id, frame.PING, extra=b"ping")))

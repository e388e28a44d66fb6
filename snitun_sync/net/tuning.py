"""What may be tuned below client and relay: sizes and times, each with its reason."""

from __future__ import annotations

# --- flow control ---------------------------------------------------------------

# A channel that holds this much undelivered is paused. Enough to keep a device's
# socket busy over the round trip of a RESUME, little enough for many of them.
HIGH_WATERMARK_BYTES = 256 * 1024
LOW_WATERMARK_BYTES = 128 * 1024
# Above this share of the budget every channel is paused that holds anything; the rest
# of it is for what is on its way already.
PRESSURE_SHARE = 0.5
PRESSURE_OVER_SHARE = 0.4
CLIENT_BUDGET_BYTES = 8 * 1024 * 1024
RELAY_BUDGET_BYTES = 64 * 1024 * 1024
LEAST_BUDGET_BYTES = 256 * 1024
# Reading goes on once the process holds less than this share of its budget.
RESUME_READING_SHARE = 0.75
# How long the tunnel may go unread while the budget is full: published peers of
# version 0 lose data 10 s after their own queue has filled.
SUSPEND_S = 8.0

# What devices and clients have sent before it is clear what they are, or before their
# tunnel had room for it. Over this, whoever has sent more than an ordinary ClientHello
# is turned away.
EARLY_BYTES = 16 * 1024 * 1024
EARLY_SMALL_BYTES = 4 * 1024
EARLY_READ_BYTES = 16 * 1024

# --- sending --------------------------------------------------------------------

# What can't be overtaken any more is counted in time: a busy tunnel fits the three sizes
# below to the rate at which the kernel says that it delivers, between these bounds.
MEASURE_S = 0.02
# One channel's turn, and so the largest frame.
TURN_S = 0.002
LEAST_TURN_BYTES = 4 * 1024
# Version 0: published peers count what they hold for a channel in frames, at most 8,000.
LEAST_VERSION_0_TURN_BYTES = 64 * 1024
TURN_BYTES = 128 * 1024
# The same where the session master throttles the tunnel's DATA frames.
THROTTLED_TURN_BYTES = 64 * 1024
# What the kernel may hold and not have sent.
UNSENT_S = 0.01
LEAST_UNSENT_BYTES = 16 * 1024
UNSENT_BYTES = 512 * 1024
# DATA on its way in a tunnel, sent and not yet read over there: what a peer must be ready
# to hold when its sockets stall. More only where the path itself holds more.
IN_FLIGHT_S = 0.02
LEAST_IN_FLIGHT_BYTES = 1024 * 1024
IN_FLIGHT_BYTES = 1536 * 1024
# Turns taken before the loop looks at other sockets.
TURNS_AT_ONCE = 16
# Below this, joining the pieces and one send is cheaper than sendmsg.
JOIN_BYTES = 16 * 1024
IOV_MAX = 1024
# With this much queued (pongs, CLOSEs: a peer that asks and doesn't read), stop reading it.
OUTPUT_LIMIT_BYTES = 1024 * 1024

# Answers that wait until the relay has proven that it knows the key.
PROVING_FRAMES = 1024

# --- time limits ----------------------------------------------------------------

HANDSHAKE_S = 10.0
# Published relays cut a tunnel on which nothing moved for 90 s; their clients ping at 50 s.
KEEPALIVE_S = 50.0
# A PING that nothing follows; one that asks because something has changed; and one whose pong
# waits behind DATA on a slow line.
ANSWER_S = 15.0
PROBE_S = 3.0
PONG_S = 90.0
# A timer that comes so late: the process was stopped, or the machine slept.
LATE_S = 5.0
SILENCE_S = 120.0
# A channel idle in both directions: a device that vanished without a word.
CHANNEL_IDLE_S = 3600.0
# A socket that has taken nothing of what it is owed at the end.
STALLED_S = 300.0
# A channel that wants to close and may not: the peer has paused it, and doesn't let it go on.
# Long enough for the 2 MiB that a published peer holds on its way to a very slow device.
FINISH_S = 900.0
# After the last byte: how long the other side may go on sending before the socket is closed.
DRAIN_S = 2.0
# How soon the connection ends behind a GOAWAY; what ends it later has another reason.
GOAWAY_S = 15.0
CONNECT_S = 10.0
# How long a stopping process waits for its sockets to end well.
STOP_S = 3.0

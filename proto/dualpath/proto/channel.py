"""Channel and server options that both ends of a connection must agree on.

Owns the limits on messages, streams, handshakes and keepalive pings. A message over the limit is
refused by gRPC itself with RESOURCE_EXHAUSTED; batches are sized so that valid ones stay below.
"""

from __future__ import annotations

MESSAGE_BYTES_MAX = 4 << 20
STREAMS_MAX = 1024
"""Most concurrent calls on one connection."""
KEEPALIVE_S = 20.0
KEEPALIVE_TIMEOUT_S = 10.0
RECONNECT_S_MIN = 0.1
RECONNECT_S_MAX = 2.0
"""Pauses between attempts to reach a server that has gone; gRPC's own grow to two minutes."""
HANDSHAKE_S = 10.0
"""Longest that a server waits for a caller's handshake, TLS included: whoever connects and says
nothing holds a descriptor."""

# The server tolerates pings as often as this; clients send them every KEEPALIVE_S.
_PING_INTERVAL_MIN_S = 5.0
assert _PING_INTERVAL_MIN_S < KEEPALIVE_S


def client_options() -> tuple[tuple[str, int], ...]:
    """Options of `grpc.aio.insecure_channel` and its kin."""
    return (
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", int(RECONNECT_S_MIN * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(RECONNECT_S_MAX * 1000)),
        # Channels share connections by default, and with them one TCP window.
        ("grpc.use_local_subchannel_pool", 1),
    )


def server_options() -> tuple[tuple[str, int], ...]:
    """Options of `grpc.aio.server`."""
    return (
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_concurrent_streams", STREAMS_MAX),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(_PING_INTERVAL_MIN_S * 1000)),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
        # With SO_REUSEPORT a second daemon would bind the same port and share its calls.
        ("grpc.so_reuseport", 0),
    )

"""A namespace as a message of the protocol, and back; for daemons, agents and engines."""

from __future__ import annotations

from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import common_pb2


def namespace_of(message: common_pb2.Namespace) -> Namespace:
    """The namespace of a message. Raises InvalidRequest naming the field."""
    layout = message.layout
    return Namespace(
        model=message.model,
        layout=KVLayout(
            layers=layout.layers,
            block_tokens=layout.block_tokens,
            layer_bytes=layout.layer_bytes,
            dtype=layout.dtype,
            attention=layout.attention,
            scales=layout.scales,
        ),
        lora=message.lora,
        shard=message.shard,
        engine_format=message.engine_format,
        hash_algorithm=message.hash_algorithm or "sha256",
        hash_root=message.hash_root,
        tenant=message.tenant,
        salt=message.salt,
    )


def namespace_message(namespace: Namespace) -> common_pb2.Namespace:
    """Inverse of `namespace_of`."""
    layout = namespace.layout
    return common_pb2.Namespace(
        model=namespace.model,
        layout=common_pb2.KVLayout(
            layers=layout.layers,
            block_tokens=layout.block_tokens,
            layer_bytes=layout.layer_bytes,
            dtype=layout.dtype,
            attention=layout.attention,
            scales=layout.scales,
        ),
        lora=namespace.lora,
        shard=namespace.shard,
        engine_format=namespace.engine_format,
        hash_algorithm=namespace.hash_algorithm,
        hash_root=namespace.hash_root,
        tenant=namespace.tenant,
        salt=namespace.salt,
    )

"""Writes corpus/: a small message of each kind as a worker or a command sends it, and streams of them.

Only the standard library is needed: python3 corpus.py
"""

import shutil
import struct
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def message(*fields):
    """Encodes (number, value): an int as a varint, a float in four bytes, bytes or str by length."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


name = message((1, 0), (2, 1), (3, 2))
losses = message((1, 0.5), (2, 0.25), (5, 1e-4))
record = message((1, 1), (2, 1), (3, name), (5, losses))
minus_zero = message((1, 1), (2, 1), (3, name), (5, message((1, -0.0), (2, 0.25))))
validation = message((1, 1), (2, 8), (3, 0.5))

# By the field of FromWorker that holds them (proto/peapod/v1/membership.proto).
from_worker = {
    "hello": (1, message((1, 4), (2, "0.1.0"), (4, 1), (5, 0), (6, "host"), (7, 1), (8, "cpu"))),
    "ready": (2, message((1, b"\7"), (2, 10))),
    "heartbeat": (3, message((1, 1), (2, 5), (3, 1))),
    "bootstrap": (4, message((1, 1), (2, b"\1"))),
    "report": (5, message((1, 1), (2, 1), (3, record), (4, message((1, 0.5))))),
    "report-of-minus-zero": (5, message((1, 1), (2, 1), (3, minus_zero))),
    "report-without-record": (5, message((1, 1), (2, 1), (5, 1))),
    "stopped": (6, message((1, 1), (2, 1), (3, 1), (4, record), (5, "peer lost"), (6, validation), (7, 1), (8, 1))),
    "stopped-far": (6, message((1, 1), (2, 2**64 - 1), (3, 2), (7, 1))),
    "lease-request": (7, message((1, 1), (2, 2))),
    "shard-report": (8, message((1, 1), (2, message((1, 0), (2, 2), (3, "k"), (4, "bad_json: no"))), (3, 10))),
    "failure": (9, message((1, "loading"), (2, "no file"))),
    "leaving": (10, message((1, "SIGTERM"))),
    "gave-back": (11, message((1, 1), (2, 3))),
    "continuing": (12, message((1, 1), (2, 2**64 - 1), (3, record))),
}
requests = {
    "upload": (1, message((1, message((1, 1), (2, 1), (3, 4), (4, message((1, "adapter"), (2, 9), (3, bytes(32)))))))),
    "download": (2, message((1, 1), (2, 4))),
    "picture": (3, message((1, 1), (2, 4), (3, 0), (4, b"\x89PNG"))),
    "status": (4, b""),
    "shards": (5, message((1, 0), (2, 1), (3, 0), (4, 100))),
    "stop": (6, message((1, "enough"))),
    "drain": (7, message((1, 1))),
}
streams = {
    "lease-and-steps": [(0, "lease-request"), (0, "report"), (1, "report-without-record"), (1, "heartbeat"), (0, "shard-report")],
    "both-stop": [(0, "lease-request"), (0, "stopped"), (1, "stopped")],
    "lies": [(0, "stopped-far"), (1, "continuing"), (1, "bootstrap"), (0, "gave-back"), (0, "hello")],
    "leaves": [(0, "leaving"), (1, "failure"), (0, "ready")],
}
pin = "0123456789abcdef" * 4
joins = {"named": f"peapod://0123456789abcdef@master:7733/{pin}", "ipv6": f"peapod://0123456789abcdef@[::1]:7733/{pin}"}


def write(target, files):
    folder = CORPUS / target
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)


def delimited(kind):
    body = message(from_worker[kind])
    return varint(len(body)) + body


shutil.rmtree(CORPUS, ignore_errors=True)
write("request", {kind: b"\0" + message(field) for kind, field in from_worker.items()} | {kind: bytes([byte]) + body for kind, (byte, body) in requests.items()})
write("worker_stream", {stream: b"".join(bytes([member]) + delimited(kind) for member, kind in said) for stream, said in streams.items()})
write("join_string", {kind: text.encode() for kind, text in joins.items()})

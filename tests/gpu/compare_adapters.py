"""Compares the newest adapters of two state folders; needs nothing but Python.

usage: compare_adapters.py STATE_DIR STATE_DIR TOLERANCE
Exits with 1 if the distance of the weights, relative to their norm, exceeds TOLERANCE.
"""
import json
import math
import pathlib
import struct
import sys


def adapter(state):
    """Weights of the newest checkpoint by name."""
    files = sorted(pathlib.Path(state).rglob("adapter.safetensors"))
    if not files:
        sys.exit(f"no adapter.safetensors under {state}")
    data = files[-1].read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    values = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            sys.exit(f"{files[-1]}: {name} is {entry['dtype']}, not F32")
        start, end = entry["data_offsets"]
        values[name] = struct.unpack(f"<{(end - start) // 4}f", data[begin + start : begin + end])
    return values


def main():
    left, right, tolerance = adapter(sys.argv[1]), adapter(sys.argv[2]), float(sys.argv[3])
    if left.keys() != right.keys():
        sys.exit(f"other tensors: {sorted(left.keys() ^ right.keys())}")
    distance = math.sqrt(sum((x - y) ** 2 for name in left for x, y in zip(left[name], right[name], strict=True)))
    norm = math.sqrt(sum(x**2 for values in left.values() for x in values))
    print(f"distance of the adapters {distance / norm:.2e}, tolerance {tolerance:.0e}")
    return 0 if distance <= tolerance * norm else 1


if __name__ == "__main__":
    sys.exit(main())

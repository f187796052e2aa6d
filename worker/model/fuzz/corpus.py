"""Writes corpus/: small files that are read, broken ones, and pickles that would run something.

A file's name says what is wanted of the readers: `ok-*` is read, everything else is refused, `hostile-NAME` by an error that names NAME.
Only the standard library is needed: python3 corpus.py
"""

import json
import shutil
import struct
import zipfile
from io import BytesIO
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"


def zipped(files):
    """A stored zip file whose bytes depend on its content alone."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integers(values):
    return b"(" + b"".join(b"K" + bytes([value]) for value in values) + b"t"


def tensor(key, shape):
    """What torch.save writes for a float tensor that fills storage `key`."""
    length, strides = 1, []
    for size in reversed(shape):
        strides.insert(0, length)
        length *= size
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K" + bytes([length]) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + integers(shape) + integers(strides) + b"\x89NtR", length


def state_dict(shapes):
    """A pickled dict of tensors, and its storages."""
    program, storages = b"\x80\x02ccollections\nOrderedDict\n)R(", {}
    for index, (name, shape) in enumerate(shapes.items()):
        value, length = tensor(str(index), shape)
        program += text(name) + value
        storages[f"x/data/{index}"] = struct.pack(f"<{length}f", *(0.25 * at for at in range(length)))
    return program + b"u.", storages


def torch_file(program, storages=None):
    return zipped({"x/data.pkl": program, "x/byteorder": b"little", **(storages or {}), "x/version": b"3\n"})


def safetensors(shapes, dtype="F32", size=4, **changes):
    header, at = {}, 0
    for name, shape in shapes.items():
        length = size
        for side in shape:
            length *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    header = json.dumps({**header, **changes}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(at)


def field(number, kind, data):
    return bytes([number << 3 | kind]) + data


def message(number, data):
    assert len(data) < 128
    return field(number, 2, bytes([len(data)]) + data)


def sentencepiece(pieces, normalizer=b"", trainer=b""):
    model = b"".join(message(1, message(1, piece.encode()) + field(2, 5, struct.pack("<f", score))) for piece, score in pieces)
    return model + message(2, trainer) + message(3, normalizer)


SHAPES = {"a": [2, 3], "b.c": [4]}
ADAPTER = {
    "layernorm.weight": [2],
    "layernorm.bias": [2],
    "projector.0.weight": [3, 2],
    "projector.2.weight": [3, 3],
    "projector.4.weight": [4, 3],
    "fc.weight": [5, 4],
    "fc.bias": [5],
}
LEGACY = {
    "layernorm.weight": [2],
    "layernorm.bias": [2],
    "fc1.weight": [3, 2],
    "fc1.bias": [3],
    "fc2.weight": [4, 3],
    "fc2.bias": [4],
    "fc3.weight": [5, 4],
    "fc3.bias": [5],
}
PIECES = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -3.0), ("\u2581ab", -1.0), ("a", -2.0), ("b", -2.0), ("\u7ea2", -4.0)]

# The ways in which a pickle reaches a function, each calling another one.
HOSTILE = {
    # GLOBAL, then REDUCE: what __reduce__ gives.
    "posix.system": b"\x80\x02cposix\nsystem\n" + text("echo run") + b"\x85R.",
    # The same where a tensor is expected.
    "os.system": b"\x80\x02}" + text("a") + b"cos\nsystem\n" + text("echo run") + b"\x85Rs.",
    # STACK_GLOBAL of protocol 4.
    "builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x031+1\x85R.",
    # INST of protocol 0: name and call at once.
    "subprocess.Popen": b"(" + text("true") + b"isubprocess\nPopen\n.",
    # NEWOBJ: a class with arguments.
    "pathlib.Path": b"\x80\x02cpathlib\nPath\n" + text("/") + b"\x85\x81.",
    # The hooks' place of a tensor.
    "builtins.exec": b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(cbuiltins\nexec\ntRs.",
    # Names that begin like those that are known.
    "torch._utils._rebuild_everything": b"\x80\x02ctorch._utils\n_rebuild_everything\n)R.",
    "torch.load": b"\x80\x02ctorch\nload\n" + text("other.pt") + b"\x85R.",
}


def shared_lists():
    """Thirty lists, each holding the one before twice: 2^30 paths to one tensor."""
    value, _ = tensor("0", [1])
    program = b"]" + value + b"aq\0"
    for index in range(30):
        program += bytes([ord("]"), ord("("), ord("h"), index, ord("h"), index, ord("e"), ord("q"), index + 1])
    return torch_file(program + b".", {"x/data/0": bytes(4)})


def corpus():
    program, storages = state_dict(SHAPES)
    whole = torch_file(program, storages)
    yield "torch_file", "ok-dict", whole
    yield "torch_file", "ok-wrapped", torch_file(b"\x80\x02}(" + text("epoch") + b"K\x07" + text("state_dict") + program[2:-1] + b"u.", storages)
    yield "torch_file", "cut-half", whole[: len(whole) // 2]
    yield "torch_file", "cut-directory", whole[:-30]
    yield "torch_file", "lying-storage", torch_file(program, {**storages, "x/data/0": bytes(20)})
    yield "torch_file", "endless-lists", shared_lists()
    yield "torch_file", "inside-itself", torch_file(b"]q\0h\0a.")
    for name, program in HOSTILE.items():
        yield "torch_file", f"hostile-{name}", torch_file(program)

    whole = safetensors(SHAPES)
    yield "safetensors_file", "ok-f32", whole
    yield "safetensors_file", "ok-metadata", safetensors(SHAPES, "BF16", 2, __metadata__={"format": "pt"})
    yield "safetensors_file", "cut-data", whole[:-1]
    yield "safetensors_file", "cut-header", whole[:30]
    yield "safetensors_file", "endless-header", b"\xff" * 8 + whole[8:]
    yield "safetensors_file", "overlapping", safetensors({"a": [4]}, b={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})
    yield "safetensors_file", "overflowing", safetensors({}, a={"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]})

    program, storages = state_dict(ADAPTER)
    yield "adapter_file", "ok-torch", torch_file(program, storages)
    yield "adapter_file", "ok-torch-legacy", torch_file(*state_dict(LEGACY))
    yield "adapter_file", "ok-safetensors", safetensors(ADAPTER)
    yield "adapter_file", "misshapen", safetensors({**ADAPTER, "projector.2.weight": [3, 4]})
    yield "adapter_file", "incomplete", torch_file(*state_dict({key: shape for key, shape in ADAPTER.items() if key != "fc.bias"}))
    yield "adapter_file", "empty-widths", safetensors({**ADAPTER, "layernorm.weight": [0]})
    yield "adapter_file", "hostile-posix.system", torch_file(HOSTILE["posix.system"])

    whole = sentencepiece(PIECES)
    yield "sentencepiece", "ok-unigram", whole
    yield "sentencepiece", "ok-without-prefix", sentencepiece(PIECES, field(3, 0, b"\0"))
    yield "sentencepiece", "cut-piece", whole[:20]
    yield "sentencepiece", "broken-table", sentencepiece(PIECES, message(2, struct.pack("<3I", 8, 1 << 31, 0xFFFFFFFF)))
    yield "sentencepiece", "other-algorithm", sentencepiece(PIECES, trainer=field(3, 0, b"\x02"))
    yield "sentencepiece", "infinite-score", sentencepiece(PIECES + [("x", float("inf"))])


if __name__ == "__main__":
    shutil.rmtree(CORPUS, ignore_errors=True)
    for reader, name, data in corpus():
        (CORPUS / reader).mkdir(parents=True, exist_ok=True)
        (CORPUS / reader / name).write_bytes(data)

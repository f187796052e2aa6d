"""Writes corpus/: small files that are read and broken ones.

A file's name says what is wanted of the readers: `ok-*` is read, everything else is refused.
Only the standard library is needed: python3 corpus.py
"""

import io
import json
import math
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
TESTDATA = HERE.parent / "testdata"


shutil.rmtree(CORPUS, ignore_errors=True)


def write(reader, files):
    folder = CORPUS / reader
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def tar(members, format=tarfile.GNU_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, encoding="latin-1" if format == tarfile.USTAR_FORMAT else "utf-8") as archive:
        for name, data, *kind in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if kind:
                info.type, info.linkname, info.size = kind[0], "/etc/passwd", 0
            archive.addfile(info, io.BytesIO(data))
    # Without the padding to 10 KiB: two blocks of zeros end a tar.
    data = out.getvalue().rstrip(b"\0")
    return data + b"\0" * (-len(data) % 512 + 1024)


def checked(header):
    """A tar header with its checksum set anew."""
    blank = header[:148] + b" " * 8 + header[156:512]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:512] + header[512:]


SAMPLE = [("a.jpg", b"1"), ("a.json", b"{}")]
PLAIN = tar(SAMPLE + [("b.jpg", b"2"), ("b.json", b"{}")])
LONG = "folder/" * 40 + "key"
huge = bytearray(tar(SAMPLE))
huge[124:136] = b"77777777777\0"
binary = bytearray(tar(SAMPLE))
binary[124:136] = b"\x80" + b"\xff" * 11
sparse = bytearray(tar([("a.jpg", b"1234"), ("b.json", b"{}")]))
sparse[156:157] = b"S"
sparse[386:410] = b"00000000000\0" + b"00000000004\0"
sparse[483:495] = b"00000000004\0"
name_bomb = bytearray(tar([(f"{LONG}.jpg", b"1")]))
name_bomb[124:136] = b"77777777777\0"
damaged = bytearray(PLAIN)
damaged[1024 + 3] ^= 0xFF

write(
    "tar",
    {
        "ok-plain": PLAIN,
        "ok-empty": b"\0" * 1024,
        "ok-gnu-long": tar([(f"{LONG}.jpg", b"1"), (f"{LONG}.json", b"{}")]),
        "ok-pax-long": tar([(f"{LONG}é.jpg", b"1"), (f"{LONG}é.json", b"{}")], tarfile.PAX_FORMAT),
        "ok-link-and-folder": tar(SAMPLE + [("d.jpg", b"", tarfile.SYMTYPE), ("e.jpg", b"", tarfile.LNKTYPE), ("f.jpg", b"", tarfile.DIRTYPE)]),
        "duplicate-key": tar(SAMPLE + [("b.jpg", b"2")] + SAMPLE),
        "duplicate-member": tar([("a.jpg", b"1"), ("a.jpg", b"1")]),
        "not-utf8": tar([("\xe9.jpg", b"1")], tarfile.USTAR_FORMAT),
        "cut-member": tar([("a.jpg", b"x" * 700), ("b.jpg", b"2")])[:900],
        "cut-header": PLAIN[:1300],
        "damaged-header": bytes(damaged),
        "forged-size": checked(bytes(huge)),
        "forged-binary-size": checked(bytes(binary)),
        "sparse": checked(bytes(sparse)),
        "endless-name": tar([("x/" * 3000 + "a.jpg", b"1")]),
        "forged-name-size": checked(bytes(name_bomb)),
        "html": b"<!DOCTYPE html>\n" * 64,
        "nothing": b"",
    },
)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


jpegs = {name: (TESTDATA / f"{name}.jpg").read_bytes() for name in ["turn1", "gray", "cmyk", "cmyk_plain", "ycck", "progressive"]}
turned = bytearray(jpegs["turn1"])
turned[turned.index(b"\x01\x12\x00\x03") + 9] = 6
bomb = bytearray(jpegs["gray"])
frame = bomb.index(b"\xff\xc0")
bomb[frame + 5 : frame + 9] = b"\xff" * 4
deep = bytearray(jpegs["gray"])
deep[frame + 4] = 12
write(
    "picture",
    {f"ok-{name}": data for name, data in jpegs.items()}
    | {
        "ok-turned": bytes(turned),
        "ok-png": png(3, 2, 8, 2, b"\0abcdefghi" * 2),
        "ok-png-alpha": png(1, 1, 8, 6, b"\0abcd"),
        "png-16-bits": png(1, 1, 16, 2, b"\0abcdef"),
        "png-bomb": png(60000, 60000, 8, 0, b"\0"),
        "png-cut": png(3, 2, 8, 2, b"\0abcdefghi" * 2)[:-20],
        "jpeg-bomb": bytes(bomb),
        "jpeg-12-bits": bytes(deep),
        "jpeg-cut": jpegs["turn1"][:-100],
        "webp": b"RIFF\x10\0\0\0WEBPVP8 ",
        "html": b"<html>404</html>",
    },
)

captions = {"caption_zh": "红", "caption_en": "red", "caption_it": "rosso"}
write(
    "json_sample",
    {
        "ok-parallel": json.dumps(captions),
        "ok-native": json.dumps({"caption_ori": "一隻貓", "caption_ori_it": "un gatto", "watermark": 1}, ensure_ascii=False).replace("1}", "null}"),
        "ok-empty": json.dumps({"caption_en": ""}),
        "ok-mark": "\ufeff" + json.dumps({"caption_en": ""}),
        "nothing": "{}",
        "ok-nested": json.dumps(captions | {"other": [[[{"a": [1, None]}]]]}),
        "small": json.dumps(captions | {"watermark": 0.1}),
        "one-sided": json.dumps({"caption_en": "red"}),
        "emptied": json.dumps({"caption_ori": "鿋", "caption_ori_it": "12"}),
        "wrong-type": json.dumps({"caption_en": 3}),
        "not-utf8": b'{"caption_en": "\xff"}',
        "lone-surrogate": '{"caption_en": "\\ud800"}',
        "deep": '{"caption_en": ' + "[" * 2000,
        "not-a-number": '{"watermark": nan}',
        "ok-not-a-number": json.dumps(captions | {"title": 'a \\"NaN', "watermark": math.nan, "other": [-math.inf, {"a": math.inf}]}),
    },
)

write(
    "shard_list",
    {
        "ok-range": "data/{00000..00123}.tar",
        "ok-steps": "{0..10..3}/{a,b,c}.tar::x.tar",
        "ok-letters": "{a..f}.tar",
        "ok-file": "file:///data/{9..0}.tar",
        "open-brace": "{0..3.tar",
        "nested": "{a,{b,c}}.tar",
        "billions": "{0..999999999}{0..999999999}.tar",
        "half-range": "{00..}.tar",
        "command": "pipe:cat {0..3}.tar",
        "empty-part": "a.tar::::b.tar",
    },
)


def cached(tensors, cut=0, header=None):
    """A cached sample: tensors as (dtype, shape, bytes) by name, in the layout of safetensors."""
    entries, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header = json.dumps(entries).encode() if header is None else header
    whole = struct.pack("<Q", len(header)) + header + data
    return whole[: len(whole) - cut]


LATENTS = {
    "original_size": ("U32", [2], struct.pack("<2I", 70, 50)),
    "crop": ("U32", [2], struct.pack("<2I", 1, 2)),
    "mean": ("F16", [4, 2, 3], bytes(48)),
    "log_variance": ("F16", [4, 2, 3], bytes(48)),
}
TEXT = {
    "english.sequence": ("BF16", [5, 6], bytes(60)),
    "english.pooled": ("BF16", [4], bytes(8)),
    "student.sequence": ("F32", [3, 2], bytes(24)),
    "student.mask": ("U8", [3], b"\1\1\0"),
}
write(
    "cached",
    {
        "ok-latents": cached(LATENTS),
        "ok-text": cached(LATENTS | TEXT),
        "ok-stamp": json.dumps({"version": 1, "made_by": "p", "shard": "a.tar", "numbers": "f32", "settings": {"a": "b"}, "probes": {"m": [1.5]}}),
        "stamp-later": json.dumps({"version": 2, "made_by": "p", "shard": "a.tar", "numbers": "f32", "settings": {}, "probes": {}}),
        "stamp-cut": '{"version": 1, "made',
        "cut": cached(LATENTS, cut=1),
        "no-mean": cached({name: tensor for name, tensor in LATENTS.items() if name != "mean"}),
        "no-size": cached(LATENTS | {"original_size": ("U32", [2], bytes(8))}),
        "long-header": struct.pack("<Q", 1 << 60) + b"{}",
        "other-kind": cached(LATENTS | {"mean": ("I64", [4, 2, 3], bytes(192))}),
        "mask-misfits": cached(LATENTS | TEXT | {"student.mask": ("U8", [2], b"\1\1")}),
        "scalar-states": cached(LATENTS | TEXT | {"english.sequence": ("F32", [], bytes(4))}),
    },
)

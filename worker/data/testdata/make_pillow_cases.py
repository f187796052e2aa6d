"""Writes the pictures that the tests of image.rs compare with: what Pillow makes of a small picture and of several kinds of JPEG.

usage: make_pillow_cases.py FOLDER ENCODER
(Pillow 13; the sizes are those that bucket::covering_size gives for the test's buckets; ENCODER is make_jpeg_cases.c, compiled)"""
import os
import subprocess
import sys

import numpy as np
from PIL import Image, ImageOps

folder = sys.argv[1]
width, height = 61, 47

# Gradients, an edge and noise: noise alone would hide a shift, gradients alone a wrong filter.
rng = np.random.default_rng(1)
y, x = np.mgrid[0:height, 0:width]
pixels = np.stack([x * 4, y * 5, np.where(x + y > 54, 230, 20)], axis=-1) + rng.integers(-12, 13, (height, width, 3))
source = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
source.save(f"{folder}/source.ppm")

for name, (bucket_width, bucket_height) in {"shrunk_wide": (24, 32), "shrunk_tall": (40, 16), "enlarged": (96, 64), "barely": (56, 48)}.items():
    scaled = width * bucket_height // height, bucket_height
    if scaled[0] < bucket_width:
        scaled = bucket_width, height * bucket_width // width
    source.resize(scaled, Image.Resampling.BILINEAR).save(f"{folder}/{name}.ppm")

smooth = source.resize((40, 32), Image.Resampling.BICUBIC)
for name, picture, options in [
    ("gray", smooth.convert("L"), {}),
    ("cmyk", smooth.convert("CMYK"), {}),
    ("progressive", smooth, {"progressive": True, "subsampling": "4:2:0"}),
]:
    picture.save(f"{folder}/{name}.jpg", quality=90, **options)
    Image.open(f"{folder}/{name}.jpg").convert("RGB").save(f"{folder}/{name}.ppm")

# Pillow takes every CMYK file for an inverted one, with or without the marker of the program that began it (APP14 "Adobe").
cmyk = bytearray(open(f"{folder}/cmyk.jpg", "rb").read())
marker = cmyk.index(b"Adobe") - 4
assert cmyk[marker : marker + 4] == b"\xff\xee\x00\x0e" and cmyk[marker + 15] == 0
open(f"{folder}/cmyk_plain.jpg", "wb").write(cmyk[:marker] + cmyk[marker + 16 :])

# YCCK: the same marker with transform 2. Its channels are those of the picture with red, green and blue inverted; the file holds them inverted.
ycc = ImageOps.invert(smooth).convert("YCbCr").split()
black = Image.eval(smooth.convert("L"), lambda value: 255 - value // 8)
Image.merge("CMYK", [ImageOps.invert(channel) for channel in (*ycc, black)]).save(f"{folder}/ycck.jpg", quality=90)
ycck = bytearray(open(f"{folder}/ycck.jpg", "rb").read())
ycck[ycck.index(b"Adobe") + 11] = 2
open(f"{folder}/ycck.jpg", "wb").write(ycck)

# Turned by EXIF: what Pillow gives when it is asked to look at it. The test changes the orientation in the first file itself.
exif = Image.Exif()
for orientation in range(1, 9):
    exif[0x0112] = orientation
    smooth.crop((0, 0, 16, 8)).save(f"{folder}/turn{orientation}.jpg", quality=90, subsampling="4:4:4", exif=exif)
    ImageOps.exif_transpose(Image.open(f"{folder}/turn{orientation}.jpg")).save(f"{folder}/turn{orientation}.ppm")
    if orientation > 1:
        os.remove(f"{folder}/turn{orientation}.jpg")

# A scan for each component; luma with a quarter of chroma's samples.
for name, options in {"scans": "2 1 1 0", "scans_restarted": "2 1 1 2", "coarse_luma": "1 2 0 0"}.items():
    jpeg = subprocess.run([sys.argv[2], *f"{smooth.width} {smooth.height} {options}".split()], input=smooth.tobytes(), stdout=subprocess.PIPE, check=True)
    open(f"{folder}/{name}.jpg", "wb").write(jpeg.stdout)

# Red, green and blue as Adobe's programs store them: nothing but their marker says so.
smooth.save(f"{folder}/adobe_rgb.jpg", quality=90, keep_rgb=True)
rgb = open(f"{folder}/adobe_rgb.jpg", "rb").read()
for header, width in ((rgb.index(b"\xff\xc0") + 10, 3), (rgb.index(b"\xff\xda") + 5, 2)):
    for number, at in enumerate(range(header, header + 3 * width, width)):
        assert rgb[at] == b"RGB"[number]
        rgb = rgb[:at] + bytes([number + 1]) + rgb[at + 1 :]
open(f"{folder}/adobe_rgb.jpg", "wb").write(rgb)

for name in ["cmyk_plain", "ycck", "scans", "scans_restarted", "coarse_luma", "adobe_rgb"]:
    Image.open(f"{folder}/{name}.jpg").convert("RGB").save(f"{folder}/{name}.ppm")

"""Writes the pictures that the tests of image.rs compare with: what Pillow makes of a small picture and of several kinds of JPEG.

usage: make_pillow_cases.py FOLDER        (Pillow 13; the sizes are those that bucket::covering_size gives for the test's buckets)"""
import os
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

for name in ["cmyk_plain", "ycck"]:
    Image.open(f"{folder}/{name}.jpg").convert("RGB").save(f"{folder}/{name}.ppm")

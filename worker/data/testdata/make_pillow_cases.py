"""Writes the pictures that the tests of image.rs compare with: what Pillow makes of a small picture and of three kinds of JPEG.

usage: make_pillow_cases.py FOLDER        (Pillow 13; the sizes are those that bucket::covering_size gives for the test's buckets)"""
import sys

import numpy as np
from PIL import Image

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

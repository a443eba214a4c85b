"""Writes tests/crop_cases/*.png: what Pillow makes of the pictures of tests/data_images.rs (needs numpy and pillow).

    python scripts/make_crop_cases.py

A file WIDTHxHEIGHT_SIZE.png holds the SIZE x SIZE crop of the WIDTH x HEIGHT picture that `picture` computes here and there:
box halving while the picture is at least twice too large, bicubic scaling of the shorter side, the middle.
"""

from pathlib import Path

import numpy as np
from PIL import Image

CASES = [(37, 53, 16), (200, 120, 32), (9, 7, 16), (24, 24, 24), (131, 130, 32), (3, 90, 8), (64, 65, 32), (1, 1, 4), (255, 100, 25)]


def picture(width: int, height: int) -> Image.Image:
    x, y, c = np.meshgrid(np.arange(width), np.arange(height), np.arange(3), indexing="xy")
    values = ((x * x * 3 + y * y * 5 + x * y * 7 + c * 340) // 4) ^ (x * 31 + y * 17)
    return Image.fromarray((values & 255).astype(np.uint8))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


folder = Path(__file__).resolve().parent.parent / "tests" / "crop_cases"
folder.mkdir(exist_ok=True)
for width, height, size in CASES:
    center_crop(picture(width, height), size).save(folder / f"{width}x{height}_{size}.png", optimize=True)

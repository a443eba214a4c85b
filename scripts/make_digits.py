"""Writes assets/digits.png and assets/digits.txt from the digits that scikit-learn ships (needs scikit-learn and pillow).

    python scripts/make_digits.py

digits.png: 45 columns of 8x8 greyscale images, read row by row; a grey value is 15 times the original 0..16.
digits.txt: the labels, one character per image, in the same order.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

COLUMNS = 45
assets = Path(__file__).resolve().parent.parent / "assets"

digits = load_digits()
images = digits.images.astype(np.uint8)
assert images.shape == (1797, 8, 8) and images.max() == 16
assert (images == digits.images).all(), "the values are whole numbers"

rows = -(-len(images) // COLUMNS)
padded = np.zeros((rows * COLUMNS, 8, 8), np.uint8)
padded[: len(images)] = images * 15
sheet = padded.reshape(rows, COLUMNS, 8, 8).swapaxes(1, 2).reshape(rows * 8, COLUMNS * 8)
Image.fromarray(sheet).save(assets / "digits.png", optimize=True)
(assets / "digits.txt").write_text("".join(str(label) for label in digits.target))

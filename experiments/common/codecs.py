"""File codecs of Pillow without the headers of their files.

Files of small images are mostly headers: the tables of JPEG alone are 4.45 bits per
pixel at 32x32 pixels. Codes of a data set share all that is the same in all files, so
only the bytes after the headers are counted: the entropy-coded scan of JPEG, the
partitions of WebP's key frame, the packets of JPEG 2000.
"""

import io
import math

import numpy as np
from PIL import Image

CODECS = ("jpeg", "webp", "jpeg2000")


def code(name: str, image: np.ndarray, quality: float) -> tuple[int, np.ndarray]:
    """Encodes and decodes one image.

    Args:
      name: one of CODECS.
      image: uint8 (H, W, C) with one or three channels.
      quality: 0 to 100 for jpeg (without subsampling of color) and webp; for jpeg2000
        (wavelet 9-7) the PSNR in dB that the encoder aims at.

    Returns:
      The number of bytes without headers, and the decoded image, uint8 (H, W, C).
    """
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    options = {
        "jpeg": {"quality": int(quality), "subsampling": 0},
        "webp": {"quality": quality, "method": 6},
        "jpeg2000": {
            "irreversible": True,
            "quality_mode": "dB",
            "quality_layers": [quality],
            "num_resolutions": 1 + min(5, int(math.log2(min(pixels.shape[:2])))),
            "no_jp2": True,
        },
    }[name]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    mode = "L" if pixels.ndim == 2 else "RGB"
    decoded = np.asarray(Image.open(buffer).convert(mode))
    num_bytes = {"jpeg": _scan, "webp": _key_frame, "jpeg2000": _packets}[name]
    return num_bytes(buffer.getvalue()), decoded.reshape(image.shape)


def _scan(data):
    """Bytes of a JPEG file between the header of its one scan and the last marker."""
    start = 2
    while True:
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4])
        start += 2 + length
        if marker == 0xDA:
            return len(data) - start - 2


def _key_frame(data):
    """Bytes of the VP8 chunk of a WebP file after the 10 bytes of the frame header."""
    start = 12
    while data[start : start + 4] != b"VP8 ":
        length = int.from_bytes(data[start + 4 : start + 8], "little")
        start += 8 + length + length % 2
    return int.from_bytes(data[start + 4 : start + 8], "little") - 10


def _packets(data):
    """Bytes of a JPEG 2000 codestream between the header of its tile and the end."""
    start = 2
    while data[start + 1] != 0x93:
        start += 2 + int.from_bytes(data[start + 2 : start + 4])
    return len(data) - start - 4

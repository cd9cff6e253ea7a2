"""Files of compressed latents.

A codec (`codec.npz`) is what the decoder knows: the quantizer and the probabilities of
the symbols (`functa.compression`), and the hash of the weights of the field. It is
shared by all signals. A file of streams (`NAME.functaz`) has the bytes of each signal.
docs/guides/functa.md describes both. The range coder is that of `constriction` (Bamler
2022, arXiv 2201.01741), which is imported where it is used.

Axes: N signals, (*grid) cells, C channels.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from experiments.common import files
from functa import compression, functaset, npz

MAGIC = b"\x93FUNCTAZ"
VERSION = 1
# Magic, version, SHA-256 of the codec, N.
_HEADER = struct.Struct("<8sH32sI")
_DIGEST_BYTES = 32
# A stream of few bytes can claim to hold many numbers.
_MAX_NUMBERS = 2**28
_LARGEST = np.finfo(np.float32).max


class Codec(NamedTuple):
    """What a decoder knows about the latents of a field.

    Attributes:
      mean, steps, shrink: (C,), as in `compression.dequantize`.
      weights, thresholds, tables, low: as in `compression.EntropyModel`.
      grid: (d,), number of cells along each axis.
      params_sha256: hash of the weights of the field, (); "" for other codes.
    """

    mean: np.ndarray
    steps: np.ndarray
    shrink: np.ndarray
    weights: np.ndarray
    thresholds: np.ndarray
    tables: np.ndarray
    low: np.ndarray
    grid: np.ndarray
    params_sha256: np.ndarray

    @property
    def model(self) -> compression.EntropyModel:
        return compression.EntropyModel(
            *(getattr(self, name) for name in compression.EntropyModel._fields)
        )

    @property
    def sha256(self) -> str:
        """The name of the codec in the files that it has written."""
        return functaset.hash_params(self._asdict())


def fit_codec(
    latents: np.ndarray,
    steps: np.ndarray,
    *,
    params_sha256: str = "",
    **options,
) -> Codec:
    """Fits a codec to training latents (N, *grid, C).

    Args:
      latents: (N, *grid, C).
      steps: (C,).
      params_sha256: hash of the weights of the field.
      **options: keywords of `compression.fit_entropy_model`.
    """
    mean = np.float64(latents).reshape(-1, latents.shape[-1]).mean(0)
    symbols = compression.quantize(latents, mean, steps)
    model = compression.fit_entropy_model(symbols, **options)
    return Codec(
        mean,
        np.float64(steps),
        compression.fit_shrink(latents, mean, steps),
        *model,
        grid=np.array(latents.shape[1:-1], np.int32),
        params_sha256=np.array(params_sha256),
    )


def load_coder() -> ModuleType:
    """The module `constriction`; raises ValueError with a hint if it is missing."""
    try:
        import constriction
    except ImportError:
        raise ValueError(
            "compression needs the range coder: pip install constriction"
        ) from None
    return constriction


def encode(codec: Codec, latents: np.ndarray) -> list[bytes]:
    """Quantizes latents (N, *grid, C) and encodes each as a stream of its own.

    Symbols beyond the tables of the codec become the last ones that have a code.

    Raises:
      ValueError: if the latents have another shape than the codec, or if constriction
        is missing.
    """
    shape = (*codec.grid, len(codec.mean))
    if latents.shape[1:] != shape:
        raise ValueError(
            f"the codec is for latents of shape {tuple(map(int, shape))}, got "
            f"{latents.shape[1:]}."
        )
    symbols = compression.quantize(latents, codec.mean, codec.steps)
    model, coder = codec.model, load_coder().stream
    family = coder.model.Categorical(lazy=True, perfect=False)
    encoders = [coder.queue.RangeEncoder() for _ in latents]

    def code(cell, base, rows):
        residuals = compression.clip_residuals(
            model, symbols[(slice(None), *cell)], base
        )
        for encoder, residual, row in zip(encoders, residuals, rows, strict=True):
            table = np.float64(model.tables[row])
            encoder.encode(residual.astype(np.int32), family, table)
        return base + model.low + residuals

    compression.code_cells(model, len(latents), codec.grid, code)
    return [encoder.get_compressed().astype("<u4").tobytes() for encoder in encoders]


def decode(codec: Codec, streams: Sequence[bytes]) -> np.ndarray:
    """Decodes N streams to latents, float32 (N, *grid, C).

    Damaged streams, which only a file without its checksum can have, end in an error or
    in other latents.

    Raises:
      ValueError: if a stream is not one of this codec, if constriction is missing, or
        if the latents have more than 2^28 numbers together.
    """
    model, coder = codec.model, load_coder().stream
    shape = (len(streams), *codec.grid.tolist(), len(codec.mean))
    if math.prod(shape) > _MAX_NUMBERS:
        raise ValueError(
            f"latents of shape {shape} have more than {_MAX_NUMBERS:,} numbers; decode "
            "fewer streams at once."
        )
    family = coder.model.Categorical(lazy=True, perfect=False)
    for number, stream in enumerate(streams):
        if len(stream) % 4:
            raise ValueError(
                f"stream {number} has {len(stream)} bytes, not a multiple of 4."
            )
    decoders = [
        coder.queue.RangeDecoder(np.frombuffer(stream, "<u4").astype(np.uint32))
        for stream in streams
    ]

    def code(cell, base, rows):
        residuals = []
        for number, (decoder, row) in enumerate(zip(decoders, rows, strict=True)):
            try:
                found = decoder.decode(family, np.float64(model.tables[row]))
            except AssertionError as error:
                raise ValueError(f"stream {number} is damaged: {error}") from None
            residuals.append(found)
        return base + model.low + np.reshape(residuals, base.shape).astype(np.int64)

    symbols = compression.code_cells(model, len(streams), codec.grid, code)
    for number, decoder in enumerate(decoders):
        if not decoder.maybe_exhausted():
            raise ValueError(
                f"stream {number} is damaged: it goes on after the last symbol."
            )
    return compression.dequantize(symbols, codec.mean, codec.steps, codec.shrink)


def save_codec(path: Path, codec: Codec) -> None:
    """Writes a codec as .npz, with a checksum."""
    files.write_npz(path, codec._asdict() | {"sha256": np.array(codec.sha256)})


def load_codec(path: str | Path) -> Codec:
    """Reads a codec.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or not a codec.
    """
    arrays = npz.read_arrays(path, {*Codec._fields, "sha256"})
    missing = [name for name in (*Codec._fields, "sha256") if name not in arrays]
    if missing:
        raise ValueError(f"{path} is not a codec: it lacks {', '.join(missing)}.")
    stored = str(arrays.pop("sha256"))
    codec = Codec(**arrays)
    if codec.sha256 != stored:
        raise ValueError(f"{path} is damaged: its checksum does not match its arrays.")
    # The checksum does not protect from the files of other programs.
    kinds = {name: array.dtype.kind for name, array in codec._asdict().items()}
    ranks = {name: array.ndim for name, array in codec._asdict().items()}
    if "".join(kinds.values()) != "fffiifiiU" or list(ranks.values()) != [
        *(1, 1, 1, 2, 1, 2, 0, 1, 0)
    ]:
        raise ValueError(f"{path} is not a codec: its arrays have other types.")
    num_channels, num_before = len(codec.mean), 2 ** len(codec.grid) - 1
    per_channel, rest = divmod(
        len(codec.tables), max(num_channels, 1) * (1 + len(codec.thresholds))
    )
    if (
        not num_channels
        or len({codec.mean.shape, codec.steps.shape, codec.shrink.shape}) > 1
        or codec.weights.shape != (num_before * num_channels, num_channels)
        or rest
        or per_channel != compression.num_phases(codec.weights)
        or min(codec.grid, default=1) < 1
        or codec.tables.dtype != np.float32
        or codec.tables.shape[1] < 2
        or not np.abs([codec.mean, codec.steps, codec.shrink]).max() < _LARGEST
        or not codec.steps.min() > 0
        or not (np.isfinite(codec.tables).all() and codec.tables.min() > 0)
    ):
        raise ValueError(f"{path} is not a codec: its arrays contradict each other.")
    return codec


def write_streams(path: Path, codec: Codec, streams: Sequence[bytes]) -> None:
    """Writes the streams of N signals into one file, with a checksum."""
    lengths = np.array([len(stream) for stream in streams], "<u4").tobytes()
    header = _HEADER.pack(MAGIC, VERSION, bytes.fromhex(codec.sha256), len(streams))
    content = b"".join([header, lengths, *streams])
    content += hashlib.sha256(content).digest()
    files.write_atomic(path, lambda file: file.write(content), mode="wb")


def read_streams(path: str | Path, codec: Codec) -> list[bytes]:
    """Reads the streams of N signals.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, of another kind, version or codec.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    content = path.read_bytes()
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} is not a file of compressed latents.")
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if len(body) < _HEADER.size or hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{path} is damaged: its checksum does not match its content.")
    _, version, sha256, num = _HEADER.unpack_from(body)
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version} of the format; this program reads version "
            f"{VERSION}."
        )
    if sha256.hex() != codec.sha256:
        raise ValueError(
            f"{path} was written with another codec ({sha256.hex()[:12]}...) than this "
            f"({codec.sha256[:12]}...)."
        )
    start = _HEADER.size + 4 * num
    lengths = np.frombuffer(body[_HEADER.size : start], "<u4")
    ends = start + np.cumsum(lengths, dtype=np.int64)
    if len(lengths) != num or (ends[-1] if num else start) != len(body):
        raise ValueError(f"{path} is damaged: its lengths do not fill the file.")
    return [
        body[end - length : end]
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]

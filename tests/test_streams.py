"""Files of compressed latents, and the codecs of Pillow without headers."""

import hashlib
import io
import math
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.common import codecs, data, streams
from functa import compression


def make_latents(num, shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.laplace(1.0, np.linspace(0.2, 2.0, shape[-1]), (num, *shape))


@pytest.fixture(scope="module")
def codec():
    return streams.fit_codec(
        make_latents(300, (3, 2, 4)), np.array([0.1, 0.3, 0.5, 0.5]), params_sha256="ab"
    )


@pytest.fixture(scope="module")
def encoded(codec):
    return streams.encode(codec, make_latents(5, (3, 2, 4), seed=1))


@pytest.mark.parametrize("shape", [(6,), (3, 2, 4), (2, 2, 2, 3), (5, 1)])
def test_round_trip_is_that_of_the_quantizer(shape):
    steps = np.full(shape[-1], 0.25)
    codec = streams.fit_codec(make_latents(200, shape), steps, num_groups=3)
    latents = make_latents(7, shape, seed=1)
    # The training latents reach as far as all of these.
    latents = np.clip(latents, -1.0, 2.0)
    encoded = streams.encode(codec, latents)
    symbols = compression.quantize(latents, codec.mean, steps)
    np.testing.assert_array_equal(
        streams.decode(codec, encoded),
        compression.dequantize(symbols, codec.mean, steps, codec.shrink),
    )
    # A stream stands alone, and its length is the ideal one.
    np.testing.assert_array_equal(
        streams.decode(codec, encoded[3:4]), streams.decode(codec, encoded)[3:4]
    )
    bits = np.array([8 * len(stream) for stream in encoded])
    ideal = compression.ideal_bits(codec.model, symbols)
    assert np.all(bits <= 1.001 * ideal + 32) and np.all(bits >= ideal - 1)


def test_symbols_without_a_code_are_clipped(codec):
    latents = make_latents(4, (3, 2, 4), seed=2)
    latents[1, 1, 0] = 1e5
    latents[2, 0, 1] = -1e5
    encoded = streams.encode(codec, latents)
    decoded = streams.decode(codec, encoded)
    ideal = compression.ideal_bits(
        codec.model, compression.quantize(latents, codec.mean, codec.steps)
    )
    bits = np.array([8 * len(stream) for stream in encoded])
    assert np.all(bits <= 1.001 * ideal + 32)
    expected = compression.dequantize(
        compression.quantize(latents, codec.mean, codec.steps),
        codec.mean,
        codec.steps,
        codec.shrink,
    )
    for i in (0, 3):
        np.testing.assert_array_equal(decoded[i], expected[i])
    # The last symbol of the table, in the direction of the lost one.
    assert np.all(decoded[1, 1, 0] > 1) and np.all(decoded[1, 1, 0] < 1e3)
    assert np.all(decoded[2, 0, 1] < 1) and np.all(decoded[2, 0, 1] > -1e3)
    # The cells that were coded before are not touched.
    np.testing.assert_array_equal(decoded[1, 0], expected[1, 0])


def test_no_signals_and_a_signal_of_no_information(codec, tmp_path):
    assert streams.encode(codec, np.zeros((0, 3, 2, 4))) == []
    streams.write_streams(tmp_path / "none", codec, [])
    assert streams.read_streams(tmp_path / "none", codec) == []
    assert streams.decode(codec, []).shape == (0, 3, 2, 4)
    certain = streams.fit_codec(np.zeros((10**5, 1)), np.ones(1))
    [stream] = streams.encode(certain, np.zeros((1, 1)))
    assert len(stream) <= 4
    np.testing.assert_array_equal(streams.decode(certain, [stream]), [[0.0]])


def test_files_are_what_the_guide_says(codec, encoded, tmp_path):
    path = tmp_path / "test.functaz"
    streams.write_streams(path, codec, encoded)
    content = path.read_bytes()
    lengths = [len(stream) for stream in encoded]
    expected = b"\x93FUNCTAZ" + (1).to_bytes(2, "little") + bytes.fromhex(codec.sha256)
    expected += (5).to_bytes(4, "little")
    expected += b"".join(n.to_bytes(4, "little") for n in lengths) + b"".join(encoded)
    assert content == expected + hashlib.sha256(expected).digest()
    assert streams.read_streams(path, codec) == encoded
    streams.save_codec(tmp_path / "codec.npz", codec)
    loaded = streams.load_codec(tmp_path / "codec.npz")
    assert loaded.sha256 == codec.sha256
    np.testing.assert_array_equal(
        streams.decode(loaded, encoded), streams.decode(codec, encoded)
    )


def test_a_stored_stream_still_decodes():
    """A change here makes old files unreadable: increase streams.VERSION then."""
    tables = np.array([[1, 2, 4, 1], [2, 2, 2, 2]] * 4, np.float32) / 8
    codec = streams.Codec(
        mean=np.array([0.5, -1.0]),
        steps=np.array([0.25, 2.0]),
        shrink=np.zeros(2),
        weights=np.array([[512, 0], [100, -700]], np.int32),
        thresholds=np.zeros(0, np.int32),
        tables=tables,
        low=np.int32(-1),
        grid=np.array([4], np.int32),
        params_sha256=np.array(""),
    )
    symbols = np.array([[[1, -1], [2, 1], [0, -2], [0, 0]]])
    latents = codec.mean + codec.steps * symbols
    [stream] = streams.encode(codec, latents)
    assert stream.hex() == "e5ff876d"
    np.testing.assert_array_equal(streams.decode(codec, [stream]), latents)


def test_every_flipped_or_missing_byte_is_found(codec, encoded, tmp_path):
    path = tmp_path / "test.functaz"
    streams.write_streams(path, codec, encoded)
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 16
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged|not a file of compressed"):
            streams.read_streams(path, codec)
        path.write_bytes(content[:place])
        with pytest.raises(ValueError, match="damaged|not a file of compressed"):
            streams.read_streams(path, codec)


def sealed(body):
    return body + hashlib.sha256(body).digest()


def test_foreign_files_are_refused(codec, encoded, tmp_path):
    path = tmp_path / "test.functaz"
    streams.write_streams(path, codec, encoded)
    body = path.read_bytes()[:-32]
    for content, message in (
        (b"", "is not a file of compressed latents"),
        (b"PK\x03\x04" * 50, "is not a file of compressed latents"),
        (sealed(body[:8] + b"\x02\x00" + body[10:]), "has version 2 of the format"),
        (sealed(body[:42] + b"\xff\xff\xff\xff" + body[46:]), "lengths do not fill"),
        (sealed(body[:46] + b"\xff\xff\xff\xff" + body[50:]), "lengths do not fill"),
        (sealed(body + b"more"), "lengths do not fill"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            streams.read_streams(path, codec)
    streams.write_streams(path, codec._replace(low=np.int32(-9)), encoded)
    with pytest.raises(ValueError, match="was written with another codec"):
        streams.read_streams(path, codec)
    with pytest.raises(ValueError, match="is not a regular file"):
        streams.read_streams(tmp_path, codec)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        streams.read_streams(tmp_path / "nothing", codec)


def test_damaged_streams_end_in_an_error_or_in_other_latents(codec, encoded):
    rng = np.random.default_rng(0)
    right = streams.decode(codec, encoded)
    for stream in [rng.bytes(4 * n) for n in range(12)] * 4:
        try:
            decoded = streams.decode(codec, [stream])
        except ValueError as error:
            assert "stream 0" in str(error)
        else:
            assert decoded.shape == (1, 3, 2, 4) and np.isfinite(decoded).all()
    with pytest.raises(ValueError, match="goes on after the last symbol"):
        streams.decode(codec, [encoded[0] + rng.bytes(40)])
    with pytest.raises(ValueError, match="stream 1 has .* not a multiple of 4"):
        streams.decode(codec, [encoded[0], encoded[1][:-1]])
    # What the coder itself refuses.
    with pytest.raises(ValueError, match="stream 1 is damaged: .*invalid"):
        streams.decode(codec, [encoded[0], b"\xff" * 400])
    np.testing.assert_array_equal(streams.decode(codec, encoded), right)


@pytest.mark.parametrize("side", [2**20, 2**40])
def test_a_grid_that_no_memory_holds_is_refused(codec, encoded, side):
    claimed = codec._replace(grid=np.array([side, side]))
    with pytest.raises(ValueError, match="more than 268,435,456 numbers; decode fewer"):
        streams.decode(claimed, encoded)


def test_bad_codecs_are_refused(codec, tmp_path):
    path = tmp_path / "codec.npz"

    def refused(changed, message):
        streams.save_codec(path, changed)
        with pytest.raises(ValueError, match=message):
            streams.load_codec(path)

    for changes in (
        {"steps": codec.steps[:-1]},
        {"shrink": codec.shrink[:-1]},
        {"mean": codec.mean * np.nan},
        {"weights": codec.weights[:-1]},
        {"thresholds": codec.thresholds[:-1]},
        {"tables": codec.tables[:0]},
        {"tables": 0 * codec.tables},
        {"tables": codec.tables[:, :1]},
        {"tables": np.full(codec.tables.shape, 1e308)},
        {"steps": -codec.steps},
        {"steps": 1e300 * codec.steps},
        dict.fromkeys(("mean", "steps", "shrink"), codec.mean[:0])
        | {"weights": codec.weights[:0, :0]},
        {"grid": np.array([3, 0], np.int32)},
        {"grid": np.array([3], np.int32)},
    ):
        refused(codec._replace(**changes), "arrays contradict each other")
    refused(codec._replace(low=np.float32(1)), "arrays have other types")
    refused(codec._replace(mean=codec.mean[None]), "arrays have other types")
    arrays = codec._asdict() | {"sha256": np.array("0" * 64)}
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="checksum does not match its arrays"):
        streams.load_codec(path)
    del arrays["tables"]
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="is not a codec: it lacks tables"):
        streams.load_codec(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="not a readable .npz file"):
        streams.load_codec(path)


def test_the_missing_coder_is_named(codec, encoded, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match="pip install constriction"):
        streams.decode(codec, encoded)


def test_latents_of_another_shape_are_refused(codec):
    with pytest.raises(ValueError, match=r"shape \(3, 2, 4\), got \(2, 3, 4\)"):
        streams.encode(codec, np.zeros((1, 2, 3, 4)))


@pytest.fixture(scope="module")
def images():
    digits = data.load_dataset("digits").splits["test"]["image"]
    gray = np.kron(digits[0], np.ones((4, 4, 1), np.uint8))  # (32, 32, 1)
    y, x = np.mgrid[:24, :40]
    color = np.stack([6 * x, 10 * y, 3 * (x + y)], axis=-1).astype(np.uint8)
    return {"gray": gray, "color": color}


@pytest.mark.parametrize("kind", ["gray", "color"])
def test_the_header_of_jpeg_is_what_all_files_share(images, kind):
    image = images[kind]
    pixels = image[..., 0] if kind == "gray" else image
    buffer = io.BytesIO()
    # Pillow leaves the tables out; SOI, APP0, SOF, SOS and EOI remain.
    Image.fromarray(pixels).save(
        buffer, "jpeg", quality=70, subsampling=0, streamtype=2
    )
    rest = 2 + 18 + (19 + 14 if kind == "color" else 13 + 10) + 2
    num_bytes, decoded = codecs.code("jpeg", image, 70)
    assert num_bytes == len(buffer.getvalue()) - rest
    assert decoded.shape == image.shape and decoded.dtype == np.uint8


def test_the_headers_of_webp_and_jpeg_2000(images):
    for image in images.values():
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "webp", quality=60, method=6)
        # RIFF 12, chunk 8, frame header 10, and a byte to make the length even.
        num_bytes, _ = codecs.code("webp", image, 60)
        assert len(buffer.getvalue()) - 30 - num_bytes in (0, 1)
        sizes = [codecs.code("jpeg2000", image, dB)[0] for dB in (20, 40)]
        assert 0 < sizes[0] < sizes[1] < image.size


@pytest.mark.parametrize("name", codecs.CODECS)
def test_more_bytes_are_a_better_image(images, name):
    for image in images.values():
        qualities = (20, 45) if name == "jpeg2000" else (5, 95)
        coded = [codecs.code(name, image, quality) for quality in qualities]
        psnr = [
            -10 * math.log10(np.square(x / 255.0 - image / 255.0).mean())
            for _, x in coded
        ]
        assert coded[0][0] < coded[1][0] and psnr[0] < psnr[1]

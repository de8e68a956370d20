"""From pixels of any kind to upright 8-bit ones."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from comcat.data import open_pictures
from comcat.data.decoding import plain
from comcat.errors import DataError

from .material import RGB8, encoded, picture, pixels


def test_sixteen_bit_grey_is_scaled_to_eight():
    values = np.array([[0, 128, 129, 257, 514, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    expected = np.round(values.astype(np.float64) / 257).astype(np.uint8)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    files = [encoded(image, "PNG"), encoded(image, "TIFF"), b"P5 9 1 65535\n" + values.byteswap().tobytes()]
    opened = [Image.open(io.BytesIO(file)) for file in files] + [Image.fromarray(values.astype(np.int32))]
    assert {image.mode for image in opened} == {"I;16", "I"}
    for image in opened:
        assert plain(image).mode == "L"
        np.testing.assert_array_equal(np.asarray(plain(image)), expected)


def test_transparency_is_laid_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    opened = Image.open(io.BytesIO(encoded(palette, transparency=1)))
    assert opened.mode == "P"
    np.testing.assert_array_equal(np.asarray(plain(opened)), [[[255, 0, 0], [255, 255, 255]]])
    half = Image.new("RGBA", (1, 1), (0, 0, 255, 51))
    np.testing.assert_array_equal(np.asarray(plain(half)), [[[204, 204, 255]]])
    grey = Image.new("LA", (1, 1), (0, 51))
    np.testing.assert_array_equal(np.asarray(plain(grey)), [[[204, 204, 204]]])
    keyed = Image.open(io.BytesIO(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))))
    np.testing.assert_array_equal(np.asarray(plain(keyed)), [[[255, 255, 255]]])


def test_other_modes_become_grey_or_colour():
    red = Image.new("RGB", (4, 4), (200, 30, 20))
    for mode in ("CMYK", "HSV", "YCbCr"):
        assert plain(red.convert(mode)).mode == "RGB"
        assert np.abs(np.asarray(plain(red.convert(mode))).astype(int) - np.asarray(red)).max() <= 3
    assert plain(red.convert("P", palette=Image.Palette.ADAPTIVE)).getpixel((0, 0)) == (200, 30, 20)
    assert plain(Image.new("1", (2, 2), 1)).getextrema() == (255, 255)
    assert plain(red) is red
    with pytest.raises(DataError, match="floating-point"):
        RGB8(Image.new("F", (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_exif_orientation_is_applied_once(orientation, mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.jpg"
    picture(0).convert(mode).save(file, exif=exif, quality=95)
    (sample,) = open_pictures(file)
    with Image.open(file) as image:
        expected = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(pixels(sample.image), pixels(expected))
    np.testing.assert_array_equal(pixels(plain(sample.image)), pixels(expected))  # as preprocessing sees it
    assert sample.image.mode == ("L" if mode == "L" else "RGB")

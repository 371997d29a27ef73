"""Pictures: their numbers as they are stored, and masks and maps back under the same names."""

import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from matchai.system.errors import InputError
from matchai.volumes.pictures import open_pictures
from matchai.volumes.volume import file_labels

SHAPE = (40, 50)


def numbers(dtype: str, low: int = 0, high: int = 4) -> NDArray[Any]:
    return np.random.default_rng(0).integers(low, high, SHAPE).astype(dtype)


def write(path: Path, values: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def write_plain_tiff(path: Path, values: NDArray[Any], *, sample_format: int = 1, photometric: int = 1) -> Path:
    """A TIFF of one strip by the letter of the standard; Pillow itself writes no signed 16 bits."""
    end = values.dtype.byteorder if values.dtype.byteorder == ">" else "<"
    content = values.tobytes()
    bits = values.dtype.itemsize * 8
    tags = {256: SHAPE[1], 257: SHAPE[0], 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: SHAPE[0]}
    tags |= {279: len(content), 339: sample_format}
    entries = b"".join(struct.pack(f"{end}HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack(f"{end}H", len(tags)) + entries + b"\0" * 4
    start = (b"MM\0*" if end == ">" else b"II*\0") + struct.pack(f"{end}I", 8 + len(content))
    path.write_bytes(start + content + directory)
    return path


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def write_plain_png(path: Path, rows: bytes, depth: int, width: int = SHAPE[1], height: int = SHAPE[0]) -> Path:
    """A grey PNG of 1 to 16 bits; `rows` each begin with a 0 for "no filter"."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def few_bits(path: Path, labels: NDArray[np.uint8], depth: int) -> Path:
    bits = np.unpackbits(labels[..., None], axis=2)[..., 8 - depth :].reshape(SHAPE[0], -1)
    return write_plain_png(path, b"".join(b"\0" + np.packbits(row).tobytes() for row in bits), depth)


GREY: dict[str, tuple[str, Callable[[Path], NDArray[Any]]]] = {}


def grey(name: str, values: NDArray[Any], writer: Callable[..., Path], **options: Any) -> None:
    def made(path: Path) -> NDArray[Any]:
        writer(path, values, **options)
        return values

    GREY[f"{values.dtype.str}{len(GREY)}{name}"] = name, made


grey("a.png", numbers("u1", 0, 255), write)
grey("a.png", numbers("u2", 0, 65535), write)
grey("A.PNG", numbers("u2", 0, 65535), write)
grey("a.tif", numbers("u1", 0, 255), write)
grey("a.tiff", numbers("u2", 0, 65535), write, compression="tiff_lzw")
grey("a.tif", numbers("f4", -2000, 2000) / np.float32(3), write, compression="tiff_adobe_deflate")
grey("a.tif", numbers("i4", -(2**20), 2**20), write)
for code in ("<i2", ">i2", "<i4", ">i4", "|i1"):
    grey("a.tif", numbers(code, -100, 100), write_plain_tiff, sample_format=2)
for code in ("<u2", ">u2"):
    grey("a.tif", numbers(code, 0, 65535), write_plain_tiff)
grey("a.tif", numbers("<u4", 0, 2**32), write_plain_tiff)


@pytest.mark.parametrize("case", GREY)
def test_numbers_are_read_as_they_are_stored(case: str, tmp_path: Path) -> None:
    name, made = GREY[case]
    values = made(tmp_path / name)
    opened = open_pictures(tmp_path / name)
    assert opened.shape == (1, *SHAPE)
    read = opened.read(0)
    assert read.dtype == np.float32
    assert np.array_equal(read, values.astype(np.float32))
    assert np.array_equal(open_pictures(tmp_path / name, is_mask=True).read_labels(0), values)


def test_rescale_makes_hu(tmp_path: Path) -> None:
    values = numbers("u2", 0, 4096)
    read = open_pictures(write(tmp_path / "a.png", values), rescale=(0.5, -1024)).read(0)
    assert np.array_equal(read, values * 0.5 - 1024)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_palette_in_a_mask_is_read_by_its_indices(suffix: str, tmp_path: Path) -> None:
    labels = numbers("u1")
    picture = Image.fromarray(labels)
    picture.putpalette([0, 0, 0, 255, 0, 0, 9, 9, 9, 0, 0, 255])
    picture.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(open_pictures(tmp_path / f"a.{suffix}", is_mask=True).read_labels(0), labels)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_in_a_mask_are_not_spread_to_grey_levels(depth: int, tmp_path: Path) -> None:
    labels = numbers("u1", 0, 2**depth)
    path = few_bits(tmp_path / "a.png", labels, depth)
    assert np.array_equal(open_pictures(path, is_mask=True).read_labels(0), labels)


def test_slices_come_in_the_order_in_which_people_count(tmp_path: Path) -> None:
    for number in (10, 9, 2, 1):
        write(tmp_path / f"s{number}.png", np.full(SHAPE, number, np.uint8))
    (tmp_path / "._s3.png").write_bytes(b"left by another system")
    (tmp_path / "notes.txt").write_bytes(b"")
    opened = open_pictures(tmp_path)
    assert [int(opened.read(index)[0, 0]) for index in range(opened.shape[0])] == [1, 2, 9, 10]


def stack_of(tmp_path: Path, num_pages: int = 5) -> Path:
    pages = [Image.fromarray(np.full(SHAPE, page, np.uint16)) for page in range(num_pages)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    return tmp_path / "stack.tif"


def test_a_stack_is_read_in_any_order_and_from_threads(tmp_path: Path) -> None:
    opened = open_pictures(stack_of(tmp_path, 12))
    found: dict[int, float] = {}

    def read(indices: list[int]) -> None:
        for index in indices:
            found[index] = float(opened.read(index).mean())

    threads = [threading.Thread(target=read, args=(list(range(12))[first::3],)) for first in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: index for index in range(12)}
    opened.close()
    assert opened.read(3).mean() == 3


def test_pictures_lie_as_viewers_show_them_unless_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", numbers("u2"))
    assert open_pictures(path).orientation == "PL"
    assert open_pictures(path, "LP").orientation == "LP"


def test_masks_and_maps_go_back_under_the_names_of_their_slices(tmp_path: Path) -> None:
    folder = tmp_path / "scan 1"
    folder.mkdir()
    for number in (2, 10):
        write(folder / f"s{number}.tif", numbers("u2"))
    classes = np.stack([numbers("u1"), 3 - numbers("u1")])
    opened = open_pictures(folder)
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):  # the second time over the first
        made = opened.save_mask(out, classes, file_labels(4, 3))
    assert sorted(path.name for path in made.iterdir()) == ["s10.png", "s2.png"]
    back = open_pictures(made, is_mask=True)
    assert np.array_equal(back.read_labels(1), (classes[1] + 1) % 4)  # 0 for the background
    values = np.stack([numbers("u2", 0, 65536), numbers("u2", 0, 65536).T.reshape(SHAPE)])
    maps = open_pictures(opened.save_map(out, values, "lesion"), is_mask=True)
    assert np.array_equal([maps.read_labels(0), maps.read_labels(1)], values)
    assert sorted(path.name for path in out.iterdir()) == ["scan 1_lesion", "scan 1_mask"]


def test_a_folder_that_holds_other_files_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a.png", numbers("u2"))
    opened = open_pictures(tmp_path)
    (tmp_path / f"{tmp_path.name}_mask").mkdir()
    (tmp_path / f"{tmp_path.name}_mask" / "by hand.png").write_bytes(b"dear")
    with pytest.raises(InputError, match=r"by hand\.png"):
        opened.save_mask(tmp_path, numbers("u1")[None], [1, 2, 3, 0])
    assert (tmp_path / f"{tmp_path.name}_mask" / "by hand.png").read_bytes() == b"dear"


def test_a_stack_comes_back_as_a_stack_and_one_picture_as_one(tmp_path: Path) -> None:
    stack = open_pictures(stack_of(tmp_path))
    classes = np.stack([numbers("u1")] * 4 + [3 - numbers("u1")])
    made = stack.save_mask(tmp_path, classes, [1, 2, 3, 0])
    assert made.name == "stack_mask.tif"
    back = open_pictures(made, is_mask=True)
    assert np.array_equal([back.read_labels(index) for index in range(5)], (classes + 1) % 4)
    one = open_pictures(write(tmp_path / "one.png", numbers("u2")))
    values = numbers("u2", 0, 65536)[None]
    assert one.save_map(tmp_path, values, "lesion").name == "one_lesion.png"
    assert np.array_equal(open_pictures(tmp_path / "one_lesion.png", is_mask=True).read_labels(0), values[0])


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / name, numbers("u2"))
    opened = open_pictures(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(IndexError):
        opened.save_mask(out, numbers("u1")[None], [1, 2, 3, 0])  # one mask for two slices
    assert list(out.iterdir()) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("a.png", lambda path: None, "does not exist"),
    "empty": ("a.png", lambda path: path.write_bytes(b""), "is empty"),
    "web page": ("a.png", lambda path: path.write_bytes(b"<html>"), "no PNG or TIFF"),
    "truncated png": ("a.png", lambda path: truncate(write(path, numbers("u2"))), "damaged"),
    "truncated tiff": ("a.tif", lambda path: truncate(write(path, numbers("u2"))), "damaged"),
    "flipped bit": ("a.png", lambda path: flip_a_bit(write(path, numbers("u2", 0, 65536))), "damaged"),
    "jpeg": ("a.jpg", lambda path: write(path, numbers("u1")), "JPEG"),
    "jpeg in disguise": ("a.png", lambda path: write(path, numbers("u1"), format="JPEG"), "JPEG"),
    "jpeg in a tiff": ("a.tif", lambda path: write(path, numbers("u1"), compression="jpeg"), "JPEG"),
    "colours": ("a.png", lambda path: write(path, np.dstack([numbers("u1")] * 3)), "colours"),
    "transparency": ("a.png", lambda path: Image.new("LA", SHAPE).save(path), "transparency"),
    "palette": ("a.png", lambda path: Image.new("P", SHAPE).save(path), "palette"),
    "black and white": ("a.png", lambda path: Image.new("1", SHAPE).save(path), "black and white"),
    "white is 0": ("a.tif", lambda path: write_plain_tiff(path, numbers("u2"), photometric=0), "white is 0"),
    "float64": ("a.tif", lambda path: write_plain_tiff(path, numbers("f8"), sample_format=3), "cannot be read"),
    "bomb": ("a.png", lambda path: write_plain_png(path, b"", 16, 10_000, 10_000), "8192"),
    "greater bomb": ("a.png", lambda path: write_plain_png(path, b"", 16, 50_000, 50_000), "8192"),
    "animation": (
        "a.png",
        lambda path: Image.new("L", SHAPE).save(path, save_all=True, append_images=[Image.new("L", SHAPE, 9)]),
        "animated",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_slice_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, spoil, told = BAD[case]
    spoil(tmp_path / name)
    with pytest.raises(InputError, match=told) as caught:
        open_pictures(tmp_path / name).read(0)
    assert str(tmp_path / name) in str(caught.value)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda folder: None, "holds no pictures"),
    "sizes": (
        lambda folder: (write(folder / "a.png", numbers("u2")), write(folder / "b.png", numbers("u2").T)),
        "alike",
    ),
    "kinds": (lambda folder: (write(folder / "a.png", numbers("u2")), write(folder / "b.png", numbers("u1"))), "alike"),
    "names": (lambda folder: [write(folder / name, numbers("u2")) for name in ("a.png", "a.tif")], "one slice"),
    "jpegs": (lambda folder: [write(folder / name, numbers("u1")) for name in ("a.png", "b.jpeg")], "JPEG"),
    "stack": (lambda folder: (stack_of(folder), write(folder / "z.png", numbers("u2"))), "pages"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_is_no_volume_is_refused(case: str, tmp_path: Path) -> None:
    spoil, told = BAD_FOLDERS[case]
    spoil(tmp_path)
    with pytest.raises(InputError, match=told):
        open_pictures(tmp_path)

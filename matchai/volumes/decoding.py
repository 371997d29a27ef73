"""Pixels of DICOM files, the packed ones decoded in a process of its own.

Decoders of packed pixels are C and C++ code that ends its whole process when it meets some kinds of damage (GDCM did so
for about one in a hundred files with a changed byte). Here that is one refused file.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from matchai.system import InputError
from matchai.volumes.dicom_image import DicomImage, read_image, read_pixels

_COUNT = struct.Struct("<q")  # of the bytes that follow; below 0 for those of a refusal
_SIGNS = (b"premature end", b"bad Huffman code")  # by which libjpeg tells that it made pixels up


def decode(images: Sequence[DicomImage]) -> Iterator[NDArray[Any]]:
    """The pixels of each image, (H, W) numbers as stored.

    Raises:
        InputError: If a file is damaged or incomplete.
    """
    if not any(image.is_packed for image in images):
        yield from map(read_pixels, images)
        return
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    command = [sys.executable, "-m", "matchai.volumes.decoding"]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment
        ) as helper,
    ):
        assert helper.stdin is not None
        try:
            for image in images:
                yield _ask(helper, image, said)
        finally:
            helper.kill()  # it has nothing to lose
            with contextlib.suppress(BrokenPipeError):
                helper.stdin.close()


def _ask(helper: "subprocess.Popen[bytes]", image: DicomImage, said: BinaryIO) -> NDArray[Any]:
    assert helper.stdin is not None
    assert helper.stdout is not None
    begun = os.fstat(said.fileno()).st_size
    with contextlib.suppress(BrokenPipeError):  # it has ended, and answers nothing
        helper.stdin.write(json.dumps(str(image.path.absolute())).encode() + b"\n")
        helper.stdin.flush()
    head = helper.stdout.read(_COUNT.size)
    num_bytes = _COUNT.unpack(head)[0] if len(head) == _COUNT.size else 0
    content = helper.stdout.read(abs(num_bytes))
    said.seek(begun)
    words = said.read()
    if num_bytes < 0:
        raise InputError(os.fsdecode(content))
    if len(content) != num_bytes or not num_bytes:
        reason = words.decode(errors="replace").strip().splitlines()[-1:]
        raise InputError(
            f"{image.path} is damaged: the decoder of its packed pixels broke down{''.join(f' ({r})' for r in reason)}."
        )
    if any(sign in words for sign in _SIGNS):
        raise InputError(f"{image.path} is damaged: its packed pixels do not decode ({words.decode().strip()}).")
    return np.frombuffer(content, image.dtype).reshape(image.shape)


def main() -> None:
    """Answers each path that comes in with its pixels."""
    for line in sys.stdin.buffer:
        try:
            image = read_image(Path(json.loads(line)))
            assert image is not None
            content = read_pixels(image).tobytes()
            count = len(content)
        except InputError as error:
            content = os.fsencode(str(error))
            count = -len(content)
        sys.stdout.buffer.write(_COUNT.pack(count) + content)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

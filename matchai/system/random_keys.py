"""Keys of random numbers: whole numbers of any size, told apart."""

import numpy as np


def seed_sequence(*numbers: int) -> np.random.SeedSequence:
    """The seed sequence of some numbers, another one for every other tuple of as many.

    numpy's own takes (2^32, 0) and (0, 1) for the same, as it strings their 32-bit words together; here each number's
    words follow their count.

    Args:
        numbers: Not negative, of any size.
    """
    words: list[int] = []
    for number in numbers:
        size = -(-int(number).bit_length() // 32)
        words += [size, *((int(number) >> 32 * place) & 0xFFFFFFFF for place in range(size))]
    return np.random.SeedSequence(words)

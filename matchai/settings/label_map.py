"""Which class a number in a mask file means."""

import difflib
import re
from collections.abc import Sequence

from matchai.system import InputError

LOWEST, HIGHEST = -32768, 65535
"""What 16 bits hold, signed or not."""


def parse_label_map(entries: Sequence[str], class_names: Sequence[str]) -> dict[int, int]:
    """Reads the setting `label_map`.

    >>> parse_label_map(["0:background", "7:lesion"], ["lesion", "background"])
    {0: 1, 7: 0}

    Args:
        entries: NUMBER:CLASS each.
        class_names: (C,) names, in channel order.

    Returns:
        The index of the class of each number.

    Raises:
        InputError: With every entry that says no number or no class, or a number for the second time.
    """
    problems: list[str] = []
    numbers: dict[int, int] = {}
    for entry in entries:
        found = re.fullmatch(r"\s*([+-]?[0-9]{1,6})\s*:\s*(.*?)\s*", entry)
        if not found or not LOWEST <= int(found[1]) <= HIGHEST:
            problems.append(
                f"label_map holds {entry!r}, but must be NUMBER:CLASS with a whole number from {LOWEST} to {HIGHEST}, "
                f"such as 0:{class_names[-1] if class_names else 'background'}."
            )
        elif found[2] not in class_names:
            near = difflib.get_close_matches(found[2], class_names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the classes are {', '.join(class_names)}."
            problems.append(f"label_map names {found[2]!r}, which is no class: {hint}")
        elif int(found[1]) in numbers:
            problems.append(f"label_map gives {int(found[1])} a class twice; keep one.")
        else:
            numbers[int(found[1])] = class_names.index(found[2])
    if problems:
        raise InputError(*problems)
    return numbers

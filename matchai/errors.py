"""What matchai says to a user who made a mistake."""


class InputError(ValueError):
    """A mistake of the user's, told before anything was written.

    Commands print it without a traceback and exit with status 2.

    Args:
        *problems: Whole sentences, one a problem: what was found, what was expected, where, and the next step.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

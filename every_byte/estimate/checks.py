"""Refusals in one line: the value, and what was expected."""


def refuse(what: str, value: object, expected: str) -> ValueError:
    """The error for a value that is not taken."""
    return ValueError(f"{what} is {value!r}: expected {expected}")


def check_whole(what: str, value: object, least: int = 0, zero: str = "") -> None:
    """Refuse what is no whole number of at least `least`.

    Args:
        what: the value's name.
        value: what was given.
        least: the smallest number there is.
        zero: what 0 stands for, if it needs to be told.

    Raises:
        ValueError: it is another type (a bool, a float), or smaller.
    """
    if type(value) is not int or value < least:
        raise refuse(what, value, f"a whole number from {least} up" + (zero and f", {zero}"))


def check_flag(what: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not bool:
        raise refuse(what, value, "True or False")


def check_choice(what: str, value: object, known: tuple[str | None, ...]) -> None:
    """Refuse what is none of the known values.

    Raises:
        ValueError: the message lists what is known.
    """
    if not any(type(value) is type(one) and value == one for one in known):
        none = "None or " if None in known else ""
        raise refuse(what, value, f"{none}one of {', '.join(filter(None, known))}")


def check_batch(batch: int, length: int) -> None:
    """Refuse numbers of sequences, or of their tokens, that there are not.

    Raises:
        ValueError: no whole number, or a negative one.
    """
    check_whole("batch", batch)
    check_whole("length", length)

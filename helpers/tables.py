"""Tables that read well in the book, in Jupyter and on Colab alike."""

from collections.abc import Iterable, Sequence

from IPython.display import Markdown
from tabulate import tabulate


def table(headers: Sequence[str], rows: Iterable[Sequence[str | int]]) -> Markdown:
    """A table of text and numbers; integers with their thousands set apart.

    A column of numbers, or of text that reads as numbers, stands to the right; cells may be empty.
    """
    text = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    align = [
        "right" if all(map(_is_number, column)) else "left" for column in zip(*text, strict=True)
    ]
    return Markdown(tabulate(text, list(headers), "pipe", colalign=align, disable_numparse=True))


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "") or 0)
    except ValueError:
        return False
    return True

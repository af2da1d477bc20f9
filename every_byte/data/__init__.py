"""What is known of models and cards: data files, each figure with its source."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: the "GB" that it is sold with, and the bytes that it has."""

    sold: int
    memory: int


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__name__).joinpath(name).read_text("utf-8"))


@cache
def cards() -> dict[str, Card]:
    """Name: card of the data file (``every_byte/data/cards.toml``), by memory."""
    return {name: Card(**card) for name, card in _read("cards.toml").items()}


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Name: what the data file says of a model (``every_byte/data/models.toml``)."""
    return _read("models.toml")

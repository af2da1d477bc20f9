"""Checkpoints that are hollow: a model's sizes, and a hole in a file where the weights would be.

A file's holes take no space on the disk, and read as zeros. What a model takes on a GPU does
not depend on its weights' values, so a virtual one loads such a checkpoint as it loads the
published one, by the same code; an 8B's 16 GB are 40 kB here.
"""

import json
import struct
from pathlib import Path
from typing import Any

from every_byte.tracker import untracked
from helpers.models import build, config


def hollow(name: str, folder: Path | str | None = None, **changes: Any) -> Path:
    """Make a folder that ``from_pretrained`` takes, with weights that are all zero.

    Do not copy it with what fills holes, nor load it onto the host: there it has full size.

    Args:
        name: as in ``every_byte/data/models.toml``.
        folder: to be made; named after the model in the working folder if None.
        changes: of its configuration, such as ``num_hidden_layers``.

    Raises:
        ValueError: the name is unknown; the message lists those that are.
        FileExistsError: the folder is there already.
    """
    settings = config(name, **changes)
    with untracked():
        parameters = dict(build(settings, "meta").named_parameters())  # tied ones once
    made = Path(name if folder is None else folder)
    made.mkdir(parents=True)
    settings.save_pretrained(made)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, parameter in parameters.items():
        begin, end = end, end + 2 * parameter.numel()
        header[key] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # https://huggingface.co/docs/safetensors: data is aligned
    with (made / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    return made

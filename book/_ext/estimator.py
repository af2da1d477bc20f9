"""The estimator's form, with the constants of the Python modules written into its page.

Models, cards, dtypes, optimizers and colours stand once, in `every_byte`; the page's
scripts read them from a JSON element.
"""

import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from docutils import nodes
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from every_byte import estimate, kinds
from every_byte.allocator import config as allocator
from every_byte.data import KEPT_BY_DRIVER, Card, catalogue, unknown_card
from every_byte.data.others import RULES, all_cards, kind_of
from every_byte.estimate import architecture, config, fit, forward, optimizers, serving
from every_byte.estimate import setup as setups
from every_byte.estimate.presets import PRESETS
from every_byte.estimate.weights import STORED

PAGE = "book/estimator"
ALLOCATOR = ("kMinBlockSize", "kSmallSize", "kLargeBuffer", "kMinLargeAlloc", "kRoundLarge")
NONE = {
    "gradients": "none: they serve training alone",
    "optimizer_states": "none: they serve training alone",
    "activations": "none is kept: one layer's at a time, not counted here",
    "kv_cache": "none: nothing is generated",
    "cast_weights": "none: no autocast of FP32 weights",
    "rounding": (
        "; a tensor of weights from 10 MiB up also keeps what is left of its 2 MiB, up to 1 MiB"
    ),
}
"""What the page says of a kind of which there is nothing; of rounding, what ``.to()`` adds."""
NOTES = {
    "rounding": (
        "the allocator's, estimated: each tensor of parameters, gradients, states and KV cache "
        f"up to a multiple of {allocator.kMinBlockSize} B"
    ),
    "context": (
        "measured, not estimated, on an H200 with PyTorch 2.11, after products and attention"
    ),
}


def of_card(card: Card) -> list[int]:
    """Bytes of its workspace and its context, and vLLM's limits on it."""
    return [card.cublas_workspace, card.context, *serving.default_limits(card)]


def data() -> dict[str, Any]:
    """What estimate.js asks for: the constants of the Python modules, under their names."""
    return {
        "traits": {name: sorted(traits) for name, traits in estimate.TRAITS.items()},
        "bytes": {name: [n.numerator, n.denominator] for name, n in estimate.BYTES.items()},
        "optimizers": {
            name: {
                "label": known.label,
                "remembers": known.remembers,
                "states": known.states,
                "store": known.store.__name__,
                "tables": known.tables,
                "foreach": known.foreach,
                "temporaries": known.temporaries,
                "fused": known.fused,
                "dtype": known.dtype,
                "rest": known.rest,
                "matrix": known.matrix.__name__ if known.matrix else "",
            }
            for name, known in estimate.OPTIMIZERS.items()
        },
        "scales": {name: [n.numerator, n.denominator] for name, n in forward.SCALES.items()},
        "paged": optimizers.PAGED,
        "apollo_rank": optimizers.APOLLO_RANK,
        "stored": {name: asdict(known) for name, known in STORED.items()},
        "sizes": [field.name for field in fields(estimate.Dimensions) if field.type is int],
        "own_names": architecture.OWN_NAMES,
        "channels": architecture.PIXEL_CHANNELS,
        "buckets": architecture.POSITION_BUCKETS,
        "bart_offset": architecture.BART_OFFSET,
        "sharding": estimate.SHARDING,
        "offloaded": {name or "null": held for name, held in setups.OFFLOADED.items()},
        "choices": estimate.CHOICES,
        "context": estimate.CONTEXT,
        "workspace": estimate.WORKSPACE,
        "lt_workspace": estimate.LT_WORKSPACE,
        "flags": estimate.FLAGS,
        "allocator": {name: getattr(allocator, name) for name in ALLOCATOR},
        "levers": fit.LEVERS,
        "halves": fit.HALVES,
        "more_gpus": fit.MORE_GPUS,
        "most_gpus": fit.MOST_GPUS,
        "kinds": {
            field.name: {
                "name": kinds.FIELDS[field.name],
                "color": kinds.COLORS[kinds.FIELDS[field.name]],
                "none": NONE.get(field.name, ""),
                "note": NOTES.get(field.name, ""),
            }
            for field in fields(estimate.Memory)
            if field.name in kinds.FIELDS
        },
        "order": fit.ORDER,
        "most_changes": fit.MOST_CHANGES,
        "most_sequences": fit.MOST_SEQUENCES,
        "presets": {name: asdict(setup) for name, (_, setup) in PRESETS.items()},
        "config": {
            "same": config.SAME,
            "required": config.REQUIRED,
            "without": config.WITHOUT,
            "activations": config.ACTIVATIONS,
            "gated": config.GATED,
            "latent": config.LATENT,
            "sliding": architecture.SLIDING,
            "biased": config.BIASED,
            "names": config.ACTIVATION_NAMES,
            "layers": architecture.KINDS_OF_LAYERS,
            "tied": config.TIED,
            "aliases": architecture.ALIASES,
            "narrow": config.NARROW,
            "other_names": config.OTHER_NAMES,
            "same_in_both": config.SAME_IN_BOTH,
            "labels": config.LABELS,
            "needed": [
                field.name
                for field in fields(estimate.Dimensions)
                if field.type is int and field.default is MISSING
            ],
        },
        "models": {
            name: {
                field.name: sizes[field.name]
                for field in fields(estimate.Dimensions)
                if sizes.get(field.name)
            }
            for name, sizes in catalogue().items()
        },
        # Bytes that programs can have, what the card's workspace and context take, and how
        # many sequences and tokens vLLM takes at a time.
        "cards": {name: [card.usable, *of_card(card)] for name, card in all_cards().items()},
        "rules": RULES,
        "kind_of": {name: kind_of(name) for name in all_cards() if kind_of(name)},
        "unknown_card": of_card(unknown_card(0)),
        "large_card": [serving.LARGE, *of_card(unknown_card(1 << 40))[2:]],
        "serving": {
            "logit_bytes": serving.LOGIT_BYTES,
            "non_torch": serving.NON_TORCH,
            "graphs": serving.GRAPHS,
            "multiple": serving.VOCABULARY_MULTIPLE,
            "block_size": estimate.Serving().block_size,
            "utilization": estimate.Serving().utilization,
        },
        "kept_by_driver": KEPT_BY_DRIVER,
    }


class Estimator(SphinxDirective):
    """``{estimator}``: the form, the results and the guided tasks."""

    def run(self) -> list[nodes.Node]:
        """The page's HTML, from estimator.html beside this file."""
        folder = Path(__file__).parent
        environment = Environment(
            loader=FileSystemLoader(folder),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        constants = data()
        script = json.dumps(constants, separators=(",", ":")).replace("<", "\\u003c")
        html = environment.get_template("estimator.html").render(
            data=constants,
            script=Markup(script),
            cards=all_cards(),
            kind_of=kind_of,
            catalogue=catalogue(),
            presets=PRESETS,
        )
        return [nodes.raw("", html, format="html")]


def add_files(app: Sphinx, page: str, *_: object) -> None:
    """Load the estimator's scripts and style on its own page only."""
    if page == PAGE:
        app.add_css_file("estimator.css")
        app.add_js_file("estimate.js", loading_method="defer")
        app.add_js_file("fit.js", loading_method="defer")
        app.add_js_file("estimator.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("estimator", Estimator)
    app.connect("html-page-context", add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

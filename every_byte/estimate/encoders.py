"""Where inference of encoder-decoders and of vision transformers peaks: no training."""

from typing import TYPE_CHECKING

from every_byte.estimate.architecture import PIXEL_CHANNELS, Dimensions
from every_byte.estimate.blocks import block
from every_byte.estimate.checks import refuse
from every_byte.estimate.forward import attention_kernel
from every_byte.estimate.weights import computed_width

if TYPE_CHECKING:
    from every_byte.estimate.setup import Setup


def is_other(sizes: Dimensions) -> bool:
    """Whether it is no decoder-only transformer."""
    return sizes.has("encoder") or sizes.has("images")


def check_reading(sizes: Dimensions, setup: "Setup") -> None:
    """Refuse what such a model cannot do.

    Raises:
        ValueError: an image of another size; all logits of a model that generates its
            answer; T5 in FP16, of which transformers keeps a part in FP32, or with flash
            attention, which takes no position bias.
    """
    positions = sizes.max_position_embeddings
    if sizes.has("images") and setup.length != positions:
        raise refuse("length", setup.length, f"{positions}, an image's patches and one more")
    if setup.all_logits:
        raise refuse("all_logits", True, f"False, for {sizes.model_type} reads before it answers")
    if sizes.has("position bias"):
        if setup.dtype == "fp16":
            raise refuse("dtype", "fp16", "fp32 or bf16, for in FP16 a part of T5 stays in FP32")
        if setup.attention == "flash":
            raise refuse("attention", "flash", "another one, for flash takes no position bias")


def given(sizes: Dimensions, setup: "Setup") -> int:
    """Bytes of what is read: pixels, or what the encoder made of the text."""
    b = computed_width(setup.dtype)
    if sizes.has("images"):
        pixels = (sizes.max_position_embeddings - 1) * sizes.patch_size**2
        return setup.batch * PIXEL_CHANNELS * max(0, pixels) * b
    return setup.batch * setup.length * sizes.hidden_size * b


def reading_moments(
    sizes: Dimensions, setup: "Setup", weights: int, cache: int
) -> tuple[tuple[str, int], ...]:
    """What is allocated while an image is looked at, or a text is read and one is written.

    The text that is written is taken to become as long as the one that is read. `weights`
    are those, and what the libraries keep; `cache` are the keys and values of both texts.
    """
    b, read = computed_width(setup.dtype), given(sizes, setup)
    scores = setup.batch * sizes.vocab_size * b
    layer = weights + encoder_temporaries(sizes, setup, b)
    if sizes.has("images"):
        return (
            ("at rest", weights + read),
            ("an image: a layer", layer + read),
            ("an image: the labels", weights + read + given_states(sizes, setup, b) + scores),
        )
    # A layer's keys and values of the text that is written, made anew with one token more.
    grown = cache // 2 // max(1, sizes.num_hidden_layers)
    return (
        ("at rest", weights + cache + read),
        ("reading: a layer of the encoder", layer),
        ("writing: the decoder", weights + cache + read + grown + scores),
    )


def given_states(sizes: Dimensions, setup: "Setup", b: int) -> int:
    """Bytes of three states between layers: the embedding's, the last layer's, and its norm."""
    return 3 * setup.batch * setup.length * sizes.hidden_size * b


def encoder_temporaries(sizes: Dimensions, setup: "Setup", b: int) -> int:
    """Bytes that an encoder's layer takes for the moment: its MLP, or its attention.

    Beside them stand the embedding's output, the layer's input and what its norm or the
    positions made (transformers 5.23, ``models/t5``, ``bart`` and ``vit``). T5's position
    bias stays for all layers; for SDPA each makes it contiguous anew
    (``integrations/sdpa_attention.py``, create_position_bias_mask). The first computes it
    from six tables of whole numbers and one of truth values (T5Attention.compute_bias).
    """
    heads, length = sizes.num_attention_heads, setup.length
    tokens, queries = setup.batch * length, heads * sizes.head_dim
    state = tokens * sizes.hidden_size * b
    inner = block(tokens * sizes.intermediate_size * b, own_segment=True)
    layers = sizes.encoder_layers or sizes.num_hidden_layers
    states = 3 if sizes.has("encoder") and sizes.has("learned positions") else 2 + (layers > 1)
    scores, plain = heads * tokens * length, not sizes.has("position bias")
    bias = 0 if plain else heads * length**2 * b
    eager = attention_kernel(sizes, setup.dtype, setup.attention) == "eager"
    mlp = (states + 1) * state + (4 if sizes.has("gated") else 2) * inner + scores * b * eager
    attention = states * state + 3 * tokens * queries * b
    if eager:
        # Before and after the softmax; ViT's is in FP32: of BF16 with a copy, of FP16 without.
        wide = sizes.has("images") and b < 4
        attention += scores * (2 * b + (4 + 2 * (setup.dtype == "bf16")) * wide)
    else:
        attention += tokens * queries * b + bias
    tables = 0 if plain else 2 * state + 3 * tokens * queries * b + (6 * 8 + 1) * length**2
    return max(bias + mlp, bias + attention, tables)

"""`qvl serve --profile`: the settings of a server with what a profile and the card's memory say filled in."""

from __future__ import annotations

from collections.abc import Callable

from serve.plan.capacity import batch, capacity, image_tokens, token_pixels
from serve.plan.load import Load
from serve.settings.backend import find_gpus
from serve.settings.config import DEFAULT_GPU_SHARE, ServerConfig
from serve.settings.profiles import choose, key_for
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.sources.directory import resolve

__all__ = ["fit_card", "fit_images", "tuned"]

#: Bounds on images that are tried where the processor's own leaves no room, in pixels: 4096 and 1280 tokens.
_PIXELS = (4096 * 784, 1280 * 784)
#: Tokens of a context that are left for the question and the answer beside the largest image, or a quarter of it.
_BESIDE_AN_IMAGE = 512


def tuned(model: str, config: ServerConfig, note: Callable[[str], None]) -> ServerConfig:
    """Return ``config`` with its profile's settings, and with a context and images that the card has room for.

    What the user gave stays. ``note`` is told what was chosen and why.

    Raises CheckpointError for a model that can't be used.
    """
    checkpoint = Checkpoint.open(resolve(model))
    chosen = choose(config.profile, key_for(checkpoint, config.device, config.parallel.tp))
    for said in chosen.notes:
        note(said)
    config = config.replaced(settings=chosen.settings)
    if config.profile == "off":
        return config
    if config.on_gpu and (gpus := find_gpus()):
        config = fit_card(checkpoint, config, min(gpu.total for gpu in gpus), note)
    return fit_images(checkpoint, config, note)


def fit_images(checkpoint: Checkpoint, config: ServerConfig, note: Callable[[str], None]) -> ServerConfig:
    """Return ``config`` with images scaled down so far that the context has room for one: else vLLM refuses each.

    A bound that the user or a profile has set stays.
    """
    if config.settings.max_pixels is not None or any(a.startswith("--mm-processor-kwargs") for a in config.extra):
        return config
    context = config.max_model_len_for(checkpoint)
    room = context - min(_BESIDE_AN_IMAGE, context // 4)
    if image_tokens(checkpoint) <= room:
        return config
    pixels = room * token_pixels(checkpoint)
    note(
        f"images of more than {pixels:,} pixels are scaled down, to fit into a context of {context} tokens; a larger "
        "--max-model-len shows them larger"
    )
    return config.replaced(settings=config.settings.replaced(max_pixels=pixels))


def fit_card(checkpoint: Checkpoint, config: ServerConfig, card: int, note: Callable[[str], None]) -> ServerConfig:
    """Return ``config`` with the context, and where that is not enough the images, that a card has room for.

    A model that does not fit at all, and what the user or the profile has set, stay as they are.
    """
    settings = config.settings
    wanted = config.max_model_len_for(checkpoint)
    if config.max_model_len is not None or settings.max_model_len is not None:
        return config
    load = Load(
        context=wanted,
        image_pixels=settings.max_pixels,
        max_num_seqs=config.max_num_seqs or settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        share=config.gpu_memory_utilization or DEFAULT_GPU_SHARE,
        tp=config.parallel.tp * config.parallel.pp,
    )
    tokens, sequences = batch(card, load)
    found = capacity(checkpoint, card, load, "")
    pixels = None
    for bound in _PIXELS if settings.max_pixels is None else ():
        if found.context >= wanted:
            break
        pixels = bound
        found = capacity(checkpoint, card, load.replaced(image_pixels=bound), "")
    if not found.fits or (found.context >= wanted and pixels is None):
        return config
    said = f"this card has room for a context of {found.context} tokens"
    if pixels is not None:
        said += f" with images of up to {pixels:,} pixels (larger ones are scaled down)"
        settings = settings.replaced(max_pixels=pixels)
    note(f"{said}, at {tokens} tokens a step and {sequences} sequences; --max-model-len decides otherwise")
    return config.replaced(max_model_len=min(wanted, found.context), settings=settings)

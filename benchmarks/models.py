"""The shapes of the parameters of known models."""


def resnet50(*, is_flax: bool) -> list[tuple[int, ...]]:
    """The shapes of a ResNet-50, with convolutions laid out as flax has them, or equinox and torch."""

    def convolution(size: int, before: int, after: int) -> list[tuple[int, ...]]:
        kernel = (size, size, before, after) if is_flax else (after, before, size, size)
        return [kernel, (after,), (after,)]  # and the scale and bias of what normalises it

    shapes, before = convolution(7, 3, 64), 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(count):
            shapes += convolution(1, before, width) + convolution(3, width, width) + convolution(1, width, 4 * width)
            shapes += convolution(1, before, 4 * width) if index == 0 else []
            before = 4 * width
    return [*shapes, (before, 1000) if is_flax else (1000, before), (1000,)]


def transformer(width: int = 512, heads: int = 8, layers: int = 6, words: int = 32000) -> list[tuple[int, ...]]:
    """The shapes of a language model with attention as in flax: projections to heads, and from them."""
    head = width // heads
    attention = [(width, heads, head), (heads, head)] * 3 + [(heads, head, width), (width,)]
    layer = [*attention, (width, 4 * width), (4 * width,), (4 * width, width), (width,), *[(width,)] * 4]
    return [(words, width), *layer * layers, (width,), (width,)]


TREES: dict[str, list[tuple[int, ...]]] = {
    "ResNet-50, flax": resnet50(is_flax=True),
    "ResNet-50, equinox": resnet50(is_flax=False),
    "transformer, 35M": transformer(),
    "projection": [(512, 8, 64)],
    "convolution, flax": [(3, 3, 64, 128)],
    "convolution, equinox": [(128, 64, 3, 3)],
    "first convolution, equinox": [(64, 3, 7, 7)],
}

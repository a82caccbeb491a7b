"""`narrowcast codecs`: the presets, spelt out, with their bits, what they need, and what they cost here."""

import torch

from narrowcast.cli.progress import shown
from narrowcast.cli.tables import screen, table
from narrowcast.codecs import PRESETS, Ranges
from narrowcast.codecs.catalogue import NUM_FEATURES, Entry, catalogue
from narrowcast.perf.cost import measure_coding
from narrowcast.progress import told

NUM_SOURCES = 2
NEEDS = {"nothing": "", "ranges": "text", "the whole model": "model"}


def codecs() -> None:
    """List the presets: bits a value, what they need, and what coding a token of 4096 features costs here.

    Any other codec is spelt out, such as group(bits=5, size=64), on the command line as in Python.
    """
    found = table("", ("preset", "spelt out", "needs"), ("bits", "us"))
    found.box, found.pad_edge = None, False  # to fit 80 columns
    with shown():
        costs = [(entry, _seconds(entry)) for entry in told(list(catalogue()), "timing codecs")]
    for entry, seconds in costs:
        spelling = entry.spelling.replace(", ", ",")
        microseconds = "" if seconds is None else f"{1e6 * seconds:.1f}"
        found.add_row(entry.name, spelling, NEEDS[entry.needs], f"{entry.bits_per_value:.2f}", microseconds)
    console = screen()
    console.print(found)
    console.print(
        f"\nBits a value of {NUM_FEATURES} features; us to encode a token of as many and to add two up, on one thread. "
        "needs: text, for ranges of features; model, for text and all of its sums at once. calibrate takes allocated, "
        "with as few bits as keep the answers. transform takes gradients, too, and multiplies each sum by a matrix of "
        "the plan: 220 MB of them for 135 M parameters among 8 ranks. Any other codec is spelt out likewise, in Python "
        "as here."
    )


def _seconds(entry: Entry) -> float | None:
    """Of a token; None where each sum is multiplied by a matrix of the plan, too."""
    if entry.product:
        return None
    codec = PRESETS[entry.name].codec(Ranges.of(torch.ones(NUM_SOURCES, 1, NUM_FEATURES)))
    cost = measure_coding(codec, NUM_FEATURES)
    return NUM_FEATURES * (cost.encode_s + NUM_SOURCES * cost.decode_s)

"""`narrowcast codecs`: the named codecs, with their bits, what they need, and what they cost here."""

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from narrowcast.calibration import recipes_by_kind
from narrowcast.calibration.fit import ModelRecipe
from narrowcast.codecs import PRESETS, Codec, Ranges
from narrowcast.perf.cost import measure_coding

NUM_FEATURES, NUM_SOURCES = 4096, 2


def codecs() -> None:
    """List the named codecs: bits a value, what they need, and what coding a token costs on this machine.

    Others are spelt out, such as group(bits=5, size=64).
    """
    columns = "codec", "bits a value", "needs", "us a token"
    table = Table(title=f"codecs, for {NUM_FEATURES} features", title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column.startswith(("bits", "us")) else "left", no_wrap=True)
    for name in PRESETS:
        table.add_row(name, *_cells(name))
    Console().print(table)
    Console(highlight=False).print(
        "us a token: encode it, and add up two payloads, on one thread. needs: text for ranges of features; a whole "
        "model for second moments and gradients; transform also multiplies matrices that attach folds into weights."
    )


def _cells(name: str) -> tuple[str, str, str]:
    recipe = recipes_by_kind({"sum": name})["sum"]
    if isinstance(recipe, ModelRecipe):
        return "as asked", "text and a whole model", ""
    codec = recipe.codec(Ranges.of(torch.ones(NUM_SOURCES, 1, NUM_FEATURES)))
    cost = measure_coding(codec, NUM_FEATURES)
    seconds = cost.encode_s + NUM_SOURCES * cost.decode_s
    return f"{8 * codec.row_nbytes(NUM_FEATURES) / NUM_FEATURES:.4g}", _needs(codec), f"{1e6 * seconds:.0f}"


def _needs(codec: Codec) -> str:
    return "text" if codec.state()[1] else "nothing"

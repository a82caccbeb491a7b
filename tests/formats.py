"""Codecs of every format and width, spelt as `recipe` reads them: what the codecs' contract is tested for.

Named presets are a few of them; `transform` is not among them, as no single site's ranges make it.
"""

from narrowcast.codecs import PRESETS, recipe

SPELT = [
    *(f"cast(dtype={dtype})" for dtype in ("bf16", "fp16", "fp32")),
    *(f"feature(bits={bits})" for bits in range(2, 9)),
    "feature(bits=4, outliers=0)",
    "feature(bits=4, choose=random)",
    *(f"group(bits={bits}, size={size})" for size in (32, 64, 128) for bits in range(2, 9)),
    *(f"group(bits={bits}, size={size}, spikes=true)" for size in (32, 64, 128) for bits in range(2, 5)),
    *(f"group(bits={bits}, size=32, symmetric=true)" for bits in range(2, 9)),
    *(f"minifloat(element={element})" for element in ("e4m3", "e5m2")),
    *(f"minifloat(element={element}, size=128)" for element in ("e4m3", "e5m2")),
    "minifloat(element=e2m1, size=32)",
    *(f"minifloat(element={element}, scale=e8m0, size=32)" for element in ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")),
    "minifloat(element=e2m1, scale=e4m3, size=16)",
    "allocated",
]

# Presets by their names, further ones too, such as docs/extending/codec.md adds.
FORMATS = list(dict.fromkeys([*(str(recipe(text)) for text in SPELT), *(PRESETS.keys() - {"transform"})]))

"""Draws docs/concepts.svg: `python docs/concepts_picture.py > docs/concepts.svg`. A test checks its sites."""

from html import escape

WIDTH, HEIGHT = 1000, 664
COLOURS = {
    "sum": "#2563eb",
    "gather": "#0f766e",
    "boundary": "#c2410c",
    "dispatch": "#7c3aed",
    "combine": "#be185d",
    "embedding": "#4b5563",
    "logits": "#4b5563",
}

# A row of the picture: what ranks compute (box) and where values travel between them (site).
BOX, SITE = "box", "site"
STAGE_0 = [
    (BOX, 150, "embedding:", "own rows"),
    (SITE, 255, "embedding", "model.embed_tokens"),
    (BOX, 365, "attention:", "own heads"),
    (SITE, 475, "sum", "model.layers.0.self_attn.o_proj"),
    (BOX, 585, "MLP:", "own features"),
    (SITE, 695, "sum", "model.layers.0.mlp.down_proj"),
    (SITE, 885, "boundary", "model.layers.0"),
]
STAGE_1 = [
    (BOX, 150, "attention:", "own heads"),
    (SITE, 255, "sum", "model.layers.1.self_attn.o_proj"),
    (BOX, 365, "MLP:", "own features"),
    (SITE, 475, "sum", "model.layers.1.mlp.down_proj"),
    (BOX, 585, "head:", "own logits"),
    (SITE, 695, "logits", "lm_head"),
    (SITE, 885, "logits", "logits"),
]
EXPERTS = [
    (BOX, 150, "router:", "half of the tokens"),
    (SITE, 255, "dispatch", "model.layers.1.mlp.experts.dispatch"),
    (BOX, 365, "own experts, on", "tokens sent here"),
    (SITE, 475, "combine", "model.layers.1.mlp.experts.combine"),
    (BOX, 585, "weighted sum:", "half of the tokens"),
    (SITE, 695, "gather", "model.layers.1.mlp.experts.gather"),
    (BOX, 840, "all tokens,", "on every rank"),
]
ROWS = [
    ("Stage 0 of the pipeline: layer 0", (0, 1), STAGE_0),
    ("Stage 1: layer 1", (2, 3), STAGE_1),
    ("In the place of an MLP, where tokens travel to their experts (tensor and expert parallelism)", (0, 1), EXPERTS),
]


def text(x: float, y: float, words: str, size: int = 13, **attributes: str) -> str:
    """A line of text, centred at x."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x}" y="{y}" font-size="{size}"{extra}>{escape(words)}</text>'


def site(x: float, top: float, kind: str, name: str) -> list[str]:
    """A bar across both ranks: dashed where nothing is coded unless asked for."""
    plain = kind in ("embedding", "logits")
    fill = "#ffffff" if plain else COLOURS[kind]
    dashes = ' stroke-dasharray="5 3"' if plain else ""
    middle = top + 55
    parts = name.rsplit(".", 2)
    lines = [name] if len(name) < 20 else [parts[0] + ".", ".".join(parts[1:])]
    return [
        f'<rect x="{x - 15}" y="{top}" width="30" height="110" rx="15" fill="{fill}" stroke="{COLOURS[kind]}"'
        f' stroke-width="2"{dashes}/>',
        text(
            x,
            middle + 5,
            kind,
            14,
            transform=f"rotate(-90 {x} {middle})",
            fill=COLOURS[kind] if plain else "#ffffff",
            font_weight="bold",
        ),
        *(text(x, top + 127 + 15 * line, part, 12, font_family="monospace") for line, part in enumerate(lines)),
    ]


def row(top: float, title: str, ranks: tuple[int, int], things: list[tuple[str, int, str, str]]) -> list[str]:
    """Two ranks side by side, and what travels between them."""
    drawn = [text(20, top - 14, title, 15, text_anchor="start", font_weight="bold")]
    for lane, rank in enumerate(ranks):
        y = top + 27 + 56 * lane
        drawn += [
            f'<line x1="70" y1="{y}" x2="{things[-1][1]}" y2="{y}" stroke="#9ca3af" stroke-width="2"/>',
            text(48, y + 5, f"rank {rank}"),
        ]
        for what, x, first, second in things:
            if what == BOX:
                drawn += [
                    f'<rect x="{x - 73}" y="{y - 22}" width="146" height="44" rx="6" fill="#f3f4f6" stroke="#9ca3af"/>',
                    text(x, y - 3, first),
                    text(x, y + 14, second),
                ]
    for what, x, kind, name in things:
        drawn += site(x, top, kind, name) if what == SITE else []
    return drawn


def picture() -> str:
    """The whole picture."""
    tops = [46, 268, 478]
    drawn = [
        line for top, (title, ranks, things) in zip(tops, ROWS, strict=True) for line in row(top, title, ranks, things)
    ]
    down = "M 885 180 V 214 H 10 V 323 H 24"
    drawn += [
        text(790, 66, "hidden states"),
        f'<path d="{down}" fill="none" stroke="{COLOURS["boundary"]}" stroke-width="2" marker-end="url(#tip)"/>',
        text(660, 232, "from rank 0 to rank 2, from rank 1 to rank 3"),
        text(790, 288, "to all stages"),
    ]
    style = "font-family='Helvetica, Arial, sans-serif' text-anchor='middle' fill='#111827'"
    tip = (
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M 0 0 L 10 5 L 0 10 z" fill="{COLOURS["boundary"]}"/></marker></defs>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>'
    back = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>'
    legend = text(20, 648, "Bars: sites, by kind. Dashed: sent as it is unless asked for.", text_anchor="start")
    return "\n".join([head, tip, back, *drawn, legend, "</svg>", ""])


if __name__ == "__main__":
    print(picture(), end="")

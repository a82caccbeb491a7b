"""The verdict in words with which calibrate, evaluate and rotate end."""

import typer

from narrowcast.scores.verdict import in_words

MORE_BITS = (
    "calibrate without --codec, to a lower KL (--target-kl 0.01) or with more bits (--bits 5), on text like yours"
)


def tell(kl_nats: float, where: str, *, to_try: str = MORE_BITS) -> None:
    """Print how much of a KL divergence people would notice, and what to try where that is much.

    Exits with status 1 where answers are unusable: who goes on after that should have to say so.
    """
    word = in_words(kl_nats)
    typer.echo(f"verdict: {word}; KL {kl_nats:.3g} nats from the uncompressed model, {where}")
    if word in ("visible", "unusable"):
        typer.echo(f"to try: {to_try}")
    if word == "unusable":
        raise typer.Exit(1)

"""`narrowcast chat`: a chat in the terminal."""

import contextlib
import sys
from functools import partial
from typing import Annotated

import typer

from narrowcast.cli import options
from narrowcast.cli.options import TEXT, option
from narrowcast.cli.progress import shown
from narrowcast.evaluation.continuations import Sampling
from narrowcast.serving.chat import Local, Partner, Remote, converse
from narrowcast.serving.remote import is_url

Where = Annotated[str, typer.Argument(metavar="URL|MODEL", help="A server's address; a folder, hub name or GGUF file.")]


def chat(
    where: Where,
    system: Annotated[str | None, option(TEXT, "TEXT", "Said to the model before all.")] = None,
    api_key: options.ApiKey = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = "auto",
    weights: options.WeightsOption = "stored",
) -> None:
    """Chat with a server of OpenAI's API, or with a model in this process: Ctrl-C ends an answer, Ctrl-D the chat.

    Lines may come from a file or a pipe: the output is answers alone then, and the status 1 if one had none.
    """
    sampling = Sampling(temperature=temperature, seed=seed)
    partner: Partner
    if is_url(where):
        partner = Remote(where, api_key=api_key, sampling=sampling)
    else:
        with shown():
            partner = Local(where, dtype=dtype, weights=weights, sampling=sampling)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and called up again
    say, warn = (partial(typer.echo, nl=False, err=err) for err in (False, True))
    typed = sys.stdin.isatty()
    all_answered = converse(partner, lambda: input("> " if typed else ""), say, warn, system=system)
    if typed:
        typer.echo()
    elif not all_answered:
        raise typer.Exit(1)

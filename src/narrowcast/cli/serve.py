"""`narrowcast serve`: a model behind an OpenAI-compatible API."""

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli import options
from narrowcast.cli.options import RUN, SERVER, SPLIT, option
from narrowcast.cli.progress import shown
from narrowcast.runtime.sampling import EVERY
from narrowcast.serving import GRACE_S, Ending, Job, Serving
from narrowcast.serving import serve as serve_job
from narrowcast.transport import DEFAULT_TIMEOUT_S, check_transport

LIMITS = "Limits"


def serve(
    model: options.ModelArgument,
    plan: Annotated[Path | None, option(SPLIT, "FILE", "A plan that calibrate wrote.")] = None,
    tensor_parallel_size: Annotated[
        int | None,
        option(SPLIT, "N", "Ranks; as the plan has it, or 1.", "-tp", "--tensor-parallel-size", min=1),
    ] = None,
    host: Annotated[str, option(SERVER, "ADDRESS", "0.0.0.0 is for everybody.")] = "127.0.0.1",
    port: Annotated[int, option(SERVER, "N", "0 for any that is free.", min=0, max=65535)] = 8000,
    api_key: options.ApiKey = None,
    name: Annotated[str | None, option(SERVER, "TEXT", "The model's, for clients.")] = None,
    max_len: Annotated[int | None, option(LIMITS, "N", "Tokens of prompt and answer.", min=2)] = None,
    max_running: Annotated[int, option(LIMITS, "N", "Requests at once.", min=1, max=1024)] = 16,
    max_waiting: Annotated[int, option(LIMITS, "N", "Others, before 429.", min=0)] = 64,
    cache_tokens: Annotated[int, option(LIMITS, "N", "Tokens of all that run.", min=64)] = 16384,
    transport: options.TransportOption = "auto",
    no_feedback: options.NoFeedback = False,
    sample_every: Annotated[int, option(RUN, "N", "Checks a sum in N.", min=0)] = EVERY,
    replicate: options.Replicate = "auto",
    dtype: options.DtypeOption = "auto",
    weights: options.WeightsOption = "stored",
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Serve a model as OpenAI's API does, on ranks started here, or on those of torchrun, until Ctrl-C or SIGTERM."""
    check_transport(transport)
    job = Job(
        model=model,
        plan=plan,
        tp_size=tensor_parallel_size,
        host=host,
        port=port,
        api_key=api_key,
        name=name,
        max_len=max_len,
        max_running=max_running,
        max_waiting=max_waiting,
        cache_tokens=cache_tokens,
        transport=transport,
        feedback=not no_feedback,
        sample_every=sample_every,
        replicated=replicate,
        dtype=dtype,
        weights=weights,
        timeout_s=timeout,
    )
    with shown() as screen:

        def hear(said: object) -> None:
            screen.hear(said)
            if isinstance(said, Serving):
                screen.close()
                typer.echo(f"serving {said.name} at {said.url}; Ctrl-C ends it")
            elif isinstance(said, Ending):
                left = f"answering {said.num_left} more, for {GRACE_S:.0f} s at most" if said.num_left else "ending"
                typer.echo(left)

        serve_job(job, hear)

"""`narrowcast tune`: measures which way the sums of a plan should take."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from narrowcast.cli.options import Overwrite, Timeout, TransportOption, WeightsOption
from narrowcast.cli.progress import shown
from narrowcast.cli.tables import cores, screen, shared, table
from narrowcast.files import check_writable
from narrowcast.launch import is_first_rank
from narrowcast.perf.machines import CLEAR, slower, written_ms
from narrowcast.perf.shares import PROMPT_TOKENS, Timed
from narrowcast.perf.tune import Tuning, Way, changes, sums_s, tune_on_ranks
from narrowcast.plan import Plan
from narrowcast.plan.decisions import FORMS
from narrowcast.transport import DEFAULT_TIMEOUT_S


def tune(
    path: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A file that calibrate wrote. The decisions go into it.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Leave PLAN as it is, and write a new file.")
    ] = None,
    overwrite: Overwrite = False,
    transport: TransportOption = "auto",
    weights: WeightsOption = "stored",
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Measure on the ranks which sums are worth coding, and by which algorithm; write that into PLAN.

    Starts the ranks on this machine; under torchrun, uses those that it started. Run it where the model will run: what
    is found holds for this link and these machines. One machine alone is timed beside the ranks, by its products.
    """
    if output is not None:
        check_writable(output, overwrite=overwrite)
    plan = Plan.load(path)
    with shown():
        tuning, products = tune_on_ranks(plan, transport=transport, timeout_s=timeout, weights=weights)
    if is_first_rank():
        tuned = replace(plan, decisions=tuning.decisions)
        tuned.save(output or path, overwrite=overwrite or output is None)
        console = screen()
        console.print(_timings(tuning))
        console.print(f"decisions written into {output or path}", markup=False)
        for line in _changes(plan, tuning, output or path):
            console.print(line, markup=False)
        prompt_ms, token_ms = (written_ms(1e3 * sums_s(plan, tuning, tokens)) for tokens in (PROMPT_TOKENS, 1))
        console.print(
            f"all sums and the logits, one after the other: {token_ms} ms of a token, {prompt_ms} ms of a prompt of "
            f"{PROMPT_TOKENS}"
        )
        _print_machines(console, products, weights)


def _print_machines(console: Console, products: Sequence[Timed], weights: str) -> None:
    """A table of one machine and of ranks, and sentences on what to see in it."""
    if not products:
        console.print(
            "One machine is not timed beside the ranks: the plan does not tell the sizes of all layers. narrowcast "
            "estimate does."
        )
        return
    title = f"one machine beside ranks: a prompt of {PROMPT_TOKENS}, a token after it, weights {weights}"
    found = table(title, ("",), ("cores", "prompt, ms", "products", "sums", "token, ms", "products", "sums"))
    *ones, ranks = products
    for each in products:
        prompt_ms, token_ms = each.answer_ms
        of_prompt, of_token = (each.prompt_s, each.prompt_sums_s), (each.token_s, each.token_sums_s)
        times_ms = prompt_ms, *(1e3 * part for part in of_prompt), token_ms, *(1e3 * part for part in of_token)
        name = f"{each.machines} ranks" if each is ranks else "one machine"
        found.add_row(name, str(each.cores), *map(written_ms, times_ms))
    console.print(found)
    console.print(
        "Products are of this model's layers, timed here; attention, norms, the embedding and Python come on top."
    )
    for sentence in against_one_machine(ones, ranks):
        console.print(sentence)


def against_one_machine(ones: Sequence[Timed], ranks: Timed) -> Iterator[str]:
    """A sentence for each machine alone over which ranks gain little or nothing."""
    for one in ones:
        (prompt_ms, token_ms), (prompt_on_ranks_ms, token_on_ranks_ms) = one.answer_ms, ranks.answer_ms
        times_ms = {"a prompt": (prompt_ms, prompt_on_ranks_ms), "a token after it": (token_ms, token_on_ranks_ms)}
        of_each = f"{ranks.machines} ranks of {cores(ranks.cores)} each"
        yield from slower(of_each, f"one machine of {cores(one.cores)}", times_ms, clear=CLEAR)
    if len(ones) > 1:
        yield shared(ones[0].cores)


def _changes(plan: Plan, tuning: Tuning, path: Path) -> Iterator[str]:
    """Lines on what is otherwise now, in time and bytes, and on what to look at again because of that."""
    recoded = set()
    for num_tokens, (before, after) in changes(plan, tuning).items():
        tokens = "a token" if num_tokens == 1 else f"{num_tokens} tokens"
        yield f"sums of {tokens}: {_way(before)}" + (f" -> {_way(after)}" if after != before else ", as before")
        if after.choice.form == "coded" and after.choice != before.choice:
            recoded.add(after.choice.algorithm)
    for algorithm in sorted(recoded):
        yield (
            f"{algorithm} makes other errors than what was chosen before: look at the quality again, "
            f"narrowcast evaluate MODEL --plan {path} --algorithm {algorithm}"
        )


def _way(way: Way) -> str:
    taken = "" if way.seconds is None else f" {1e6 * way.seconds:.0f} us each,"
    return f"{way.choice},{taken} {way.nbytes:,} bytes of all"


def _timings(tuning: Tuning) -> Table:
    """Median microseconds by size and way; the chosen one with a star, what was not measured with a tilde."""
    ways = list(dict.fromkeys(choice for timing in tuning.timings for choice in timing.seconds))
    found = table("us a sum; *: chosen; ~: extrapolated", (), ("tokens", "bytes", *map(str, ways)))
    for timing in tuning.timings:
        measured, best = "" if timing.measured else "~", timing.best(FORMS)
        cells = (
            f"{measured}{1e6 * timing.seconds[way]:.0f}{'*' if way == best else ' '}" if way in timing.seconds else ""
            for way in ways
        )
        found.add_row(str(timing.num_tokens), str(timing.nbytes), *cells)
    return found

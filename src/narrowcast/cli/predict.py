"""`narrowcast predict`: what a split model would spend on its sums over a link, before there is one."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrowcast.cli.options import ModelArgument, TensorParallel
from narrowcast.codecs import Ranges, recipe
from narrowcast.collectives import ALGORITHMS, Stages
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_report, write_report
from narrowcast.launch.link import Link
from narrowcast.perf.estimate import SOFTWARE, CostModel, measure_coding, plain_coding
from narrowcast.plan.decisions import Choice
from narrowcast.plan.split import Split

PRESETS = "int8-feature", "int4-feature", "int4-group128", "feature(bits=2)"
ITEMSIZE = 2  # bytes of a BF16 value, in which models compute


@dataclass(frozen=True, kw_only=True)
class Sites:
    """What travels in one forward: `num_sums` coded sums of `num_features`, `num_plain` others; logits of all ranks."""

    num_features: int
    num_sums: int
    num_plain: int
    num_logits: int


def predict(
    model: ModelArgument,
    link: Annotated[str, typer.Option(metavar="RATE,DELAY", help="Of each rank, such as 10Gbps,50us.")],
    tp: TensorParallel = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    codec: Annotated[list[str], typer.Option(metavar="PRESET", help="Again and again for several.")] = [*PRESETS],  # noqa: B006 (typer copies it)
    transport: Annotated[str, typer.Option(help=f"What moves the bytes: {', '.join(SOFTWARE)}.")] = "tcp",
    json: Annotated[Path | None, typer.Option(help="Write the figures here; replaces an earlier report.")] = None,
) -> None:
    """Predict what MODEL, split over --tp ranks, spends on communication for a prompt and for each token after it.

    Reads the model's config only. What coding costs is measured on this machine, on one thread.
    """
    check_report(json)
    if tp < 2 or transport not in SOFTWARE:
        raise InvalidInputError(
            "predict",
            expected=f"--tp above 1, and --transport {' or '.join(SOFTWARE)}",
            found=f"--tp {tp}, --transport {transport}",
            remedy="Pass --tp 2, say.",
        )
    wire, sites = Link.parse(link), _sites(model, tp)
    rows = list(_rows(sites, codec, tp, wire, transport, tokens))
    if json is not None:
        options = {"model": model, "tp": tp, "link": str(wire), "tokens": tokens, "transport": transport}
        write_report(json, {**options, "sites": vars(sites), "rows": rows})
    _print(rows, f"{Path(model).name}, tp_size {tp}, {wire} a rank, {transport}", tokens, sites)


def _sites(model: str, tp_size: int) -> Sites:
    engine = load_engine()
    skeleton = engine.skeleton(model)
    config: Any = skeleton.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds = Counter(engine.sites(skeleton, Split(tp_size=tp_size)).values())
    return Sites(
        num_features=config.hidden_size,
        num_sums=kinds["sum"],
        num_plain=kinds["embedding"],
        num_logits=config.vocab_size if kinds["logits"] else 0,
    )


def _rows(
    sites: Sites, codecs: list[str], tp_size: int, link: Link, transport: str, tokens: int
) -> Iterator[dict[str, Any]]:
    """Native sums, plain ones by our algorithms, then each codec by each algorithm."""
    plain = plain_coding(sites.num_features)
    for name in ("bf16", *codecs):
        stages = _stages(name, sites.num_features, tp_size)
        cost = CostModel(
            stages=stages,
            num_features=sites.num_features,
            world_size=tp_size,
            link=link,
            transport=transport,
            coded=measure_coding(stages.codecs[0], sites.num_features),
            plain=plain,
        )
        choices = [Choice("coded", algorithm) for algorithm in ALGORITHMS]
        for choice in [Choice("native"), *choices] if name == "bf16" else choices:
            seconds = [_forward_s(cost, choice, sites, num_tokens) for num_tokens in (tokens, 1)]
            native = choice.form == "native"
            bits = 8 * stages.codecs[0].row_nbytes(sites.num_features) / sites.num_features
            yield {
                "codec": "native" if native else name,
                "algorithm": None if native else choice.algorithm,
                "bits_per_value": bits,
                "prefill_ms": 1e3 * seconds[0],
                "decode_ms_per_token": 1e3 * seconds[1],
                "break_even_nbytes": None if native else cost.break_even_nbytes(choice),
            }


def _stages(name: str, num_features: int, tp_size: int) -> Stages:
    """Codecs of the right size: scales do not matter."""
    made = recipe(name)
    return Stages(tuple(made.codec(Ranges.of(torch.ones(sources, 1, num_features))) for sources in (tp_size, 1)))


def _forward_s(cost: CostModel, choice: Choice, sites: Sites, num_tokens: int) -> float:
    """All sums of a forward; what is not coded travels as it is, by the algorithm that is faster."""
    plain = [cost.sum_s(Choice("plain", algorithm), num_tokens) for algorithm in ALGORITHMS]
    if choice.form == "native":
        plain = [cost.sum_s(choice, num_tokens)]
    coded = cost.sum_s(choice, num_tokens) or cost.sum_s(Choice("coded", "one_shot"), num_tokens) or 0.0
    logits_s = cost.gather_s(sites.num_logits * ITEMSIZE) if sites.num_logits else 0.0
    return sites.num_sums * coded + sites.num_plain * min(each for each in plain if each is not None) + logits_s


def _print(rows: list[dict[str, Any]], title: str, tokens: int, sites: Sites) -> None:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("codec", "algorithm"):
        table.add_column(column, no_wrap=True)
    for column in ("bits", f"{tokens} tokens, ms", "1 token, ms", "pays from"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        from_nbytes = row["break_even_nbytes"]
        pays = "" if row["codec"] == "native" else "never" if from_nbytes is None else _size(from_nbytes)
        times = f"{row['prefill_ms']:.1f}", f"{row['decode_ms_per_token']:.2f}"
        table.add_row(row["codec"], row["algorithm"] or "", f"{row['bits_per_value']:.2f}", *times, pays)
    console = Console()
    console.print(table)
    console.print(
        f"Time on the wire and in codecs of {sites.num_sums} sums of {sites.num_features} features, {sites.num_plain} "
        "embedding and the logits of one token, which are not coded; without what the model computes. native: a ring. "
        "pays from: bytes of the smallest BF16 tensor whose sum is faster than a native one.",
        highlight=False,
    )


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes = nbytes / 1024  # type: ignore[assignment]
    return f"{nbytes:.3g} GiB"

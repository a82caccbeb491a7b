"""The speed at which a split model answers, by codec and link, against the same model as its engine splits it."""

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowcast.attaching import attach
from narrowcast.calibration import moments_needed, observe, recipes_by_kind
from narrowcast.calibration.moments import MomentsNeeded
from narrowcast.engines import Replicated, Weights, load_engine
from narrowcast.engines.parts import load_part
from narrowcast.errors import NarrowcastError
from narrowcast.launch import Link, run
from narrowcast.launch.alone import alone, cores_of_host, with_cores
from narrowcast.perf.timing import Case, Span, over_ranks
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.progress import Progress, tell
from narrowcast.runtime.prompts import Chunks
from narrowcast.transport import DEFAULT_TIMEOUT_S, TorchDistributedTransport

VOCAB_SIZE, HEAD_SIZE = 32_000, 128
NUM_CALIBRATION_TOKENS = 64
WEIGHTS = "weights"
TWO_RANKS = Split(tp_size=2)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama's layers, by default of 380 M parameters in all."""

    hidden_size: int = 2048
    num_layers: int = 8
    intermediate_size: int = 4992

    def __str__(self) -> str:
        return f"a Llama of {self.num_layers} layers of {self.hidden_size} and {self.intermediate_size}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Answers to measure: `batch` prompts of `prefill` tokens, then `decode` tokens one by one, `rounds` times each.

    `replicated`: of the vocabulary, what each rank keeps whole, so that nothing of it travels. `weights`: as of
    `engine.load`; plans are made of the weights as they are stored, and fit whatever becomes of them. `timeout_s`:
    until a rank is lost.
    """

    shape: Shape = Shape()
    codecs: Sequence[str] = ("int4-feature",)
    transports: Sequence[str] = ("auto",)
    prompt_chunks: Sequence[Chunks] = (1,)
    split: Split = TWO_RANKS
    batch: int = 1
    prefill: int = 512
    decode: int = 24
    rounds: int = 3
    timeout_s: float = DEFAULT_TIMEOUT_S
    replicated: Replicated = "none"
    weights: Weights = "stored"


DEFAULT = Job()


class Way(NamedTuple):
    """A codec over a transport, how a prompt runs, and the cores of each process."""

    codec: str
    transport: str
    prompt_chunks: Chunks
    cores: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Those of `attach`."""
        return {"transport": self.transport, "prompt_chunks": self.prompt_chunks}


NATIVE = Way("native", "torch", 1)  # the engine's own sums, over the group that it makes
ALONE = Way("one machine", "none", 1)  # the whole model in one process


class Spans(NamedTuple):
    """One answer: from the prompt to its first token, and all tokens after that."""

    prefill: Span
    decode: Span


@contextmanager
def prepared(job: Job) -> Iterator[Path]:
    """A folder with weights and a plan for each codec, kept as long as the context."""
    engine = load_engine()
    from narrowcast.engines.transformers.files.random_llama import save_random_llama

    with tempfile.TemporaryDirectory(prefix="narrowcast-") as folder:
        weights, num_heads = Path(folder) / WEIGHTS, job.shape.hidden_size // HEAD_SIZE
        save_random_llama(weights, vocab_size=VOCAB_SIZE, num_heads=num_heads, **asdict(job.shape))
        needed = [moments_needed(recipes_by_kind(codec)) for codec in job.codecs]
        moments = max(needed, key=get_args(MomentsNeeded).index)
        model, ids, split = engine.load(weights), _ids(NUM_CALIBRATION_TOKENS), job.split
        seen = observe(model, [ids], tp_size=split.tp_size, pp_size=split.pp_size, moments=moments)
        for codec in job.codecs:
            seen.plan(codec, measured=False).save(f"{folder}/{codec}")
        yield Path(folder)


def rows(job: Job, folder: Path, link: Link | None) -> Iterator[dict[str, Any]]:
    """Rows for one machine alone, for the engine's own sums in BF16, and for each codec: medians of interleaved rounds.

    One machine has all cores of the first rank's, and, where several ranks share these, in a second row as many as a
    rank has.
    """
    by_rank = run(_on_rank, job.split.world_size, job, folder, link=link, timeout_s=job.timeout_s)
    for way in by_rank[0]:
        if not (answers := [own for measured in by_rank if (own := measured[way])]):
            continue  # another rank was alone, which under torchrun is elsewhere
        prefill = over_ranks([[each.prefill for each in own] for own in answers])
        decode = over_ranks([[each.decode for each in own] for own in answers])
        yield {
            "link": None if link is None else str(link),
            **way._asdict(),
            "weights": job.weights,
            "prefill_tokens": job.prefill,
            "ttft_ms": statistics.median(prefill) * 1e3,
            "decode_ms_per_token": statistics.median(decode) * 1e3 / job.decode,
        }


def loaded(job: Job, folder: Path) -> tuple[nn.Module, dict[str, Plan]]:
    """This rank's part of the model, and the plans by codec."""
    model = load_part(load_engine(), folder / WEIGHTS, split=job.split, replicated=job.replicated, weights=job.weights)
    return model, {codec: Plan.load(folder / codec) for codec in job.codecs}


def ways(job: Job) -> list[Way]:
    """All ways of a job but the engine's own."""
    return list(itertools.starmap(Way, itertools.product(job.codecs, job.transports, job.prompt_chunks)))


def _on_rank(job: Job, folder: Path) -> dict[Way, list[Spans]]:
    """The answers of this rank, those of one machine on the first rank."""
    (model, plans), ranks, share = loaded(job, folder), TorchDistributedTransport(), torch.get_num_threads()
    whole = alone(ranks, lambda: load_engine().load(folder / WEIGHTS, weights=job.weights), "loading the whole model")
    alones = [ALONE._replace(cores=cores) for cores in sorted({cores_of_host(), share}, reverse=True)]
    shared = [way._replace(cores=share) for way in (NATIVE, *ways(job))]
    measured: dict[Way, list[Spans]] = {way: [] for way in (*alones, *shared)}
    for round in range(-1, job.rounds):
        tell(Progress("measuring, round", round + 1, job.rounds + 1))
        for way in alones:
            spans = alone(ranks, partial(_answer_alone, whole, job, way.cores), "waiting for one machine")
            if round >= 0 and spans:
                measured[way].append(spans)
        for way in shared:
            plan = plans.get(way.codec)
            with nullcontext() if plan is None else attach(model, plan, **way.options):
                if round < 0:  # warms up besides
                    _check_agreement(model, way.codec, job.prefill)
                spans = answer(model, job)
            if round >= 0:
                measured[way].append(spans)
    return measured


def _answer_alone(model: nn.Module | None, job: Job, num_cores: int) -> Spans:
    assert model is not None, "the first rank has the whole model"
    with with_cores(num_cores):
        return _timed(model, job)


@torch.no_grad()
def _check_agreement(model: nn.Module, codec: str, num_tokens: int) -> None:
    """NarrowcastError unless all ranks end with the same finite logits: it is not worth timing otherwise."""
    logits = model(input_ids=_ids(num_tokens), use_cache=False, logits_to_keep=1).logits
    ours = logits.float().numpy().tobytes()
    theirs: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(theirs, ours)
    if set(theirs) != {ours} or not logits.isfinite().all():
        raise NarrowcastError(f"{codec}: the ranks do not end with the same finite logits; please report it")


def answer(model: nn.Module, job: Job) -> Spans:
    """Time one answer; all ranks begin together."""
    dist.barrier()
    return _timed(model, job)


@torch.no_grad()
def _timed(model: nn.Module, job: Job) -> Spans:
    ids, state = _ids(job.prefill, job.batch), None

    def forward() -> None:
        nonlocal ids, state
        outputs = model(input_ids=ids, past_key_values=state, use_cache=True, logits_to_keep=1)
        ids, state = outputs.logits[:, -1:].argmax(-1), outputs.past_key_values

    def decode() -> None:
        for _ in range(job.decode):
            forward()

    return Spans(Case(forward).timed(), Case(decode).timed())


def _ids(num_tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch, num_tokens), generator=torch.Generator().manual_seed(0))

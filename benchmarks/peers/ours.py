"""Answers by narrowcast."""

import itertools
import os
import statistics
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from peers.answer import TIMEOUT_S, Answer, Place, sent_bytes
from peers.gguf_file import write_gguf

from narrowcast import attach
from narrowcast.calibration import observe
from narrowcast.engines import load_engine
from narrowcast.engines.parts import load_part
from narrowcast.engines.replication import affordable
from narrowcast.perf import model as models
from narrowcast.perf.model import Job, Spans
from narrowcast.perf.timing import over_ranks
from narrowcast.perf.tune import tune
from narrowcast.plan import Plan
from narrowcast.transport import connect_group

FORMATS = "BF16", "Q4_0"  # of weights: those of `models.prepared`, and a GGUF file of them


def prepare(job: Job, folder: Path, weights: str) -> None:
    """Write weights and plans in that format beside those of `models.prepared`."""
    if weights == FORMATS[0]:
        return
    write_gguf(folder / models.WEIGHTS, _weights(folder, weights), weights)
    model, split = load_engine().load(_weights(folder, weights)), job.split
    seen = observe(model, [models._ids(models.NUM_CALIBRATION_TOKENS)], tp_size=split.tp_size, moments="none")
    for codec in job.codecs:
        seen.plan(codec, measured=False).save(_plan(folder, codec, weights))


def _weights(folder: Path, weights: str) -> Path:
    return folder / (models.WEIGHTS if weights == FORMATS[0] else f"{weights}.gguf")


def _plan(folder: Path, codec: str, weights: str) -> Path:
    return folder / (codec if weights == FORMATS[0] else f"{codec} of {weights}")


def answer(job: Job, folder: Path, weights: str, place: Place) -> Answer:
    """An answer at `place` after others, by what `models.prepared` left in `folder`."""
    with place.ranks() as ranks:
        spans, sent = zip(*ranks.run(_on_rank, job, folder, weights), strict=True)
    (prompt_s,) = over_ranks([[each.prefill] for each in spans])
    (decode_s,) = over_ranks([[each.decode] for each in spans])
    return Answer(prompt_s=prompt_s, ms_per_token=decode_s * 1e3 / job.decode, bytes_per_token=statistics.mean(sent))


def _on_rank(job: Job, folder: Path, weights: str) -> tuple[Spans, float]:
    """The times of an answer, and the bytes that this rank sends for each token after its prompt."""
    split = job.split.tp_size > 1
    engine, path = load_engine(), _weights(folder, weights)
    plans = [_tuned(_plan(folder, job.codecs[0], weights))] if split else []
    model = load_part(engine, path, split=job.split, replicated=affordable(engine, path, plans) if split else "none")
    with attach(model, *plans) if split else nullcontext():
        models.answer(model, replace(job, decode=job.decode // 8))  # warms up
        sent = [sent_bytes([os.getpid()])]
        for each in (replace(job, decode=0), job):
            spans = models.answer(model, each)
            sent.append(sent_bytes([os.getpid()]))
    of_prompt, of_answer = (after - before for before, after in itertools.pairwise(sent))
    return spans, (of_answer - of_prompt) / job.decode


def _tuned(path: Path) -> Plan:
    """A plan with what is decided for it on this link."""
    plan = Plan.load(path)
    ranks = connect_group(None, transport="tcp", device=torch.device("cpu"), timeout_s=TIMEOUT_S)
    return replace(plan, decisions=tune(plan, ranks).decisions)

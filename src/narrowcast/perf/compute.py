"""The time of a model's products with its weights, from their shapes: on one machine, or on several that share them.

For a token the bytes of weights that are read count, for a prompt the multiplications: each at a rate that products of
this machine show, or that is given. Attention, norms and Python come on top, on any number of machines.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from narrowcast.engines import Matrix
from narrowcast.engines.replication import free_nbytes
from narrowcast.errors import InvalidInputError
from narrowcast.launch.alone import cores_of_host, with_cores
from narrowcast.perf.products import Format, copies, nbytes_of, product, tokens
from narrowcast.perf.timing import Case, interleaved, seconds
from narrowcast.plan.split import Split

SIDE = 4096  # of the matrices that are measured with
PROMPT, ROUNDS = 128, 8
_SIZES = {"G": 1e9, "T": 1e12}
_TEXT = re.compile(
    r"(\d+(?:\.\d+)?)GB(?:ps|/s),(\d+(?:\.\d+)?)([GT])FLOPS,(\d+(?:\.\d+)?)([GT])B", re.ASCII | re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes of weights that it reads, and multiplications with additions that it does, a second; bytes of memory.

    `origin`: where the figures come from, in words.
    """

    read_bps: float
    macs_per_s: float
    memory_nbytes: int
    origin: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """The machine of a text such as "50GBps,2TFLOPS,32GB"; InvalidInputError for others."""
        found = _TEXT.fullmatch(text.replace(" ", ""))
        if found is None or not all(float(found[group]) for group in (1, 2, 4)):
            raise InvalidInputError(
                "--machine",
                expected="RATE,SPEED,MEMORY, each above nothing",
                found=repr(text),
                remedy="Write it as 50GBps,2TFLOPS,32GB.",
            )
        rate, speed, prefix, size, unit = found.groups()
        return cls(
            read_bps=float(rate) * 1e9,
            macs_per_s=float(speed) * _SIZES[prefix.upper()] / 2,
            memory_nbytes=round(float(size) * _SIZES[unit.upper()]),
            origin="as given",
        )

    @classmethod
    def measured(cls, form: Format) -> Self:
        """This one, with all its cores: the fastest of a few products with weights in a format, or of a dtype.

        Memory is what is free now.
        """
        cores, shape = cores_of_host(), (SIDE, SIDE)
        nbytes = nbytes_of(form, shape)
        with with_cores(cores), torch.no_grad():
            products = [product(form, shape) for _ in range(copies(nbytes))]
            token, prompt = (tokens(form, num_tokens, SIDE) for num_tokens in (1, PROMPT))
            cases = {
                "token": Case(lambda: [each(token) for each in products]),
                "prompt": Case(lambda: products[0](prompt)),
            }
            interleaved(cases, 1)
            taken_s = {name: min(seconds(spans)) for name, spans in interleaved(cases, ROUNDS).items()}
        return cls(
            read_bps=len(products) * nbytes / taken_s["token"],
            macs_per_s=PROMPT * SIDE * SIDE / taken_s["prompt"],
            memory_nbytes=free_nbytes(),
            origin=f"measured here, {cores} core{'s' * (cores != 1)}",
        )


@dataclass(frozen=True, kw_only=True)
class Products:
    """Seconds of a prompt's and of a token's products on each of some machines, and bytes of weights that it holds."""

    prompt_s: float
    token_s: float
    held_nbytes: int

    @classmethod
    def of(cls, matrices: Sequence[Matrix], machine: Machine, split: Split, num_tokens: int) -> Self:
        """Of a prompt of `num_tokens` tokens. Stages work one after the other: they share memory, not time."""
        prompt_s = token_s = held = 0.0
        for each in matrices:
            size, values = each.nbytes / each.number, each.shape[0] * each.shape[1]
            share = 1 / split.tp_size if each.is_shared else 1.0
            held += each.nbytes * share / split.pp_size
            token_s += size * _used_by_token(each, split) / machine.read_bps
            if each.used:
                macs = values * each.used * share * (1 if each.of_last else num_tokens)
                read = size * share * min(each.number, each.used * num_tokens)
                prompt_s += max(macs / machine.macs_per_s, read / machine.read_bps)
        return cls(prompt_s=prompt_s, token_s=token_s, held_nbytes=round(held))


def typical(matrices: Sequence[Matrix]) -> Format:
    """The format of most weights."""
    nbytes: Counter[Format] = Counter()
    for each in matrices:
        nbytes[each.format] += each.nbytes
    return nbytes.most_common(1)[0][0]


def _used_by_token(matrix: Matrix, split: Split) -> float:
    """Matrices that the rank which has most to do reads for a token: of whole experts, one at least."""
    if not matrix.is_shared:
        return matrix.used
    if matrix.number > 1 and split.experts != "slices":
        return -(-matrix.used // split.tp_size)
    return matrix.used / split.tp_size

"""The products of a plan's model, timed on its ranks: whole on the first one's machine, and in the shares of all."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch

from narrowcast.engines import Weights
from narrowcast.launch.alone import alone, cores_of_host, with_cores
from narrowcast.perf.products import Format, copies, nbytes_of, product, tokens
from narrowcast.perf.timing import Case, interleaved, rounds_within, seconds
from narrowcast.plan import Plan
from narrowcast.transport.group import GroupTransport
from narrowcast.weights.formats import Q4_0, Q8_0, WeightFormat

PROMPT_TOKENS = 512
PROMPT_ROUNDS, TOKEN_SECONDS = 2, 0.2  # of each, after a run that does not count
FORMATS = {each.name: each for each in (Q4_0, Q8_0)}
SIZES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"
EXPERTS = "num_local_experts", "num_experts"
GATED = "mlp.down_proj"  # the name of what follows a product of two


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of a prompt's and of a token's products, and of their sums, on so many machines of so many cores each."""

    machines: int
    cores: int
    prompt_s: float
    token_s: float
    prompt_sums_s: float = 0.0
    token_sums_s: float = 0.0

    @property
    def answer_ms(self) -> tuple[float, float]:
        """Milliseconds of a prompt and of a token, products and sums one after the other."""
        return 1e3 * (self.prompt_s + self.prompt_sums_s), 1e3 * (self.token_s + self.token_sums_s)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The matrices of each of `number` layers that are alike, and the bytes of the output layer."""

    matrices: Sequence[tuple[Format, tuple[int, int]]]
    number: int
    output_nbytes: int

    @classmethod
    def of(cls, plan: Plan, weights: Weights, num_ranks: int) -> Self | None:
        """A rank's share of them; None where the plan does not tell: of experts, and of layers that differ."""
        config = plan.model.config
        sizes = [config.get(name) for name in SIZES]
        if not all(type(size) is int for size in sizes) or any(config.get(name) for name in EXPERTS):
            return None
        stream, inner, number, heads, vocabulary = (int(size or 0) for size in sizes)
        keys, width = config.get("num_key_value_heads", heads), config.get("head_dim") or stream // heads
        if type(keys) is not int or type(width) is not int:
            return None
        gates = 2 if any(name.endswith(GATED) for name in plan.sites) else 1
        rows = [((heads + 2 * keys) * width, stream), (gates * inner, stream)]
        columns = [(stream, heads * width), (stream, inner)]
        form = FORMATS.get(weights, torch.bfloat16)
        output = Q8_0 if isinstance(form, WeightFormat) and stream % Q8_0.group_size == 0 else torch.bfloat16
        return cls(
            matrices=[
                *(_share(form, shape, (num_ranks, 1)) for shape in rows),
                *(_share(form, shape, (1, num_ranks)) for shape in columns),
            ],
            number=number,
            output_nbytes=nbytes_of(output, (-(-vocabulary // num_ranks), stream)),
        )

    @property
    def nbytes(self) -> int:
        """Of one layer."""
        return sum(nbytes_of(*each) for each in self.matrices)

    def answer_s(self) -> tuple[float, float]:
        """Seconds of all products of a prompt and of a token; of the output layer, for one token, by its bytes."""
        prompt_s, token_s = self._layer_s(PROMPT_TOKENS, 1), self._layer_s(1, min(copies(self.nbytes), self.number))
        output_s = self.output_nbytes * token_s / self.nbytes
        return self.number * prompt_s + output_s, self.number * token_s + output_s

    def _layer_s(self, num_tokens: int, number: int) -> float:
        """Of one layer in the mean of `number`, by the fastest run."""
        given = {shape[1]: tokens(form, num_tokens, shape[1]) for form, shape in self.matrices}
        stack = [(product(*each), given[each[1][1]]) for _ in range(number) for each in self.matrices]
        case = {"": Case(lambda: [run(x_TK) for run, x_TK in stack])}
        interleaved(case, 1)
        rounds = rounds_within(TOKEN_SECONDS, case) if num_tokens == 1 else PROMPT_ROUNDS
        return min(seconds(interleaved(case, rounds)[""])) / number


def one_and_shares(plan: Plan, ranks: GroupTransport, weights: Weights, sums_s: tuple[float, float]) -> list[Timed]:
    """One machine with all cores, and with as many as a rank has if several share these; then the slowest of all ranks.

    `sums_s`: of a prompt and of a token, of ranks. All ranks call this; what is timed alone is known to the first one
    only. Empty where the plan does not tell sizes.
    """
    whole, share = (Layers.of(plan, weights, number) for number in (1, plan.tp_size))
    if whole is None or share is None:
        return []
    own = torch.get_num_threads()
    found: list[Timed] = []
    for cores in sorted({cores_of_host(), own}, reverse=True):
        timed = alone(ranks, partial(_timed, whole, 1, cores), "timing products on one machine")
        found += [] if timed is None else [timed]
    ranks.share("", "timing products")  # so that all begin together
    mine = _timed(share, plan.tp_size, None)
    told: list[dict[str, Any]] = list(map(json.loads, ranks.share(json.dumps(vars(mine)), "timing products")))
    slowest = {name: max(each[name] for each in told) for name in ("prompt_s", "token_s")}
    of_prompt, of_token = sums_s
    return [*found, replace(mine, **slowest, prompt_sums_s=of_prompt, token_sums_s=of_token)]


@torch.no_grad()
def _timed(layers: Layers, machines: int, num_cores: int | None) -> Timed:
    """With so many cores, or with those that a rank has."""
    if num_cores is not None:
        with with_cores(num_cores):
            return _timed(layers, machines, None)
    prompt_s, token_s = layers.answer_s()
    return Timed(machines=machines, cores=torch.get_num_threads(), prompt_s=prompt_s, token_s=token_s)


def _share(form: Format, shape: tuple[int, int], parts: tuple[int, int]) -> tuple[Format, tuple[int, int]]:
    """The part of a matrix [N, K], in whole groups of columns; in BF16 if it has none."""
    if isinstance(form, WeightFormat):
        if shape[1] % form.group_size:
            return _share(torch.bfloat16, shape, parts)
        num_groups = -(-shape[1] // form.group_size // parts[1])
        return form, (-(-shape[0] // parts[0]), num_groups * form.group_size)
    return form, (-(-shape[0] // parts[0]), -(-shape[1] // parts[1]))

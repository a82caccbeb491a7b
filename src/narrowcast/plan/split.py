"""The parallel layout of a model, and the kinds of sites where values travel then."""

from dataclasses import dataclass
from typing import Literal, get_args

from narrowcast.errors import InvalidInputError

# What travels at a site: partial sums of row-parallel layers and of experts; columns of layers or slices of tokens
# that every rank needs whole; hidden states between pipeline stages; tokens to their experts and back; rows of a
# split embedding; logits.
KINDS = ("sum", "gather", "boundary", "dispatch", "combine", "embedding", "logits")
SUMS = ("sum", "embedding")  # added up over ranks; the others have one source

UNCODED = ("embedding", "logits")  # unless asked for

MAX_RANKS = 1 << 16  # of a layer, and stages

Experts = Literal["slices", "all_reduce", "all_to_all"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The parallel layout of a model: each of `pp_size` stages of layers over `tp_size` ranks.

    `experts`: "slices" of every expert on each rank (tensor parallelism), or whole experts, each on one of the
    `tp_size` ranks (expert parallelism), whose outputs are summed ("all_reduce") or to which tokens travel
    ("all_to_all"), as Transformers' `ep_implementation` has it.
    """

    tp_size: int = 1
    pp_size: int = 1
    experts: Experts = "slices"

    def __post_init__(self) -> None:
        sizes = self.tp_size, self.pp_size
        if not all(type(size) is int and 1 <= size <= MAX_RANKS for size in sizes) or self.experts not in get_args(
            Experts
        ):
            raise InvalidInputError(
                "split",
                expected=f"tp_size and pp_size from 1 to {MAX_RANKS}, experts one of {', '.join(get_args(Experts))}",
                found=f"{self.tp_size!r}, {self.pp_size!r}, {self.experts!r}",
                remedy="Choose other values.",
            )

        if self.experts != "slices" and self.pp_size > 1:
            raise InvalidInputError(
                "split",
                expected="whole experts, or a pipeline: no engine splits a model both ways yet",
                found=str(self),
                remedy="Leave one of them out.",
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp_size * self.pp_size

    def __str__(self) -> str:
        parts = [f"tp_size {self.tp_size}"]
        parts += [f"pp_size {self.pp_size}"] if self.pp_size > 1 else []
        parts += [f"whole experts ({self.experts})"] if self.experts != "slices" else []
        return ", ".join(parts)

"""The figures of a record: what they are called, and how they are written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A figure, by its name for users."""

    title: str
    form: str
    of_speed: bool = False
    less_is_better: bool = True


NLL, FIRST, NEXT, RATE, SENT = "nll_nats", "first_token_ms", "token_ms", "tokens_per_s", "sent_bytes_per_token"
MACHINE = "machine_ms"
FIGURES = {
    NLL: Figure("NLL, nats a token", "{:.4f}"),
    FIRST: Figure("first token, ms", "{:.1f}", of_speed=True),
    NEXT: Figure("a token after it, ms", "{:.2f}", of_speed=True),
    RATE: Figure("tokens a second", "{:.1f}", of_speed=True, less_is_better=False),
    SENT: Figure("bytes a rank sends, a token", "{:.0f}"),
    MACHINE: Figure("(fixed work here, ms)", "{:.1f}"),
}
SPEEDS = tuple(name for name, figure in FIGURES.items() if figure.of_speed)

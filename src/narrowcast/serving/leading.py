"""The loop of each rank: the first one takes requests from the desk, says what all do next, and chooses the tokens."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from narrowcast.engines import Pages
from narrowcast.errors import NarrowcastError
from narrowcast.launch import losses_named
from narrowcast.serving.answer import Answer
from narrowcast.serving.board import Board
from narrowcast.serving.desk import Desk
from narrowcast.serving.orders import Order, Orders, carry_out
from narrowcast.serving.requests import Piece

LONGEST_BEAT_S = 1.0

STOPPED = "the server was stopped before this request was answered"


class Leader:
    """Answers the requests of `desk` with the model in `pages`, on all ranks that hear its `orders`.

    `board`: where figures of the ranks are posted when somebody asks. `ends`: tokens that end a text. `beat_s`: seconds
    between orders while there is nothing to do, so that ranks which are gone are missed, and this one is not.
    """

    def __init__(
        self,
        desk: Desk,
        board: Board,
        pages: Pages,
        orders: Orders,
        tokenizer: Any,
        ends: Collection[int],
        *,
        beat_s: float = LONGEST_BEAT_S,
    ) -> None:
        self._desk, self._board, self._pages, self._orders, self._beat_s = desk, board, pages, orders, beat_s
        self._tokenizer, self._ends = tokenizer, ends
        self._answers: dict[str, Answer] = {}  # that run
        self._unscored: dict[str, Answer] = {}  # of those, whose prompts are scored, one after the other
        self._tokens: list[int] = []  # chosen in the last step
        self._removed: list[str] = []
        self._added: list[tuple[str, list[int]]] = []

    def run(self) -> None:
        """Answer until the desk is closed and all is done; whatever ends it otherwise, those who asked hear of it."""
        try:
            with losses_named():
                while not self._desk.done:
                    if not self._answers:
                        self._desk.wait(self._beat_s)
                    self._step()
                self._orders.give(Order(ends=True))
        except Exception as error:
            kind = "" if isinstance(error, NarrowcastError) else f"{type(error).__name__}: "
            self._desk.fail(f"the model failed: {kind}{error}")
            raise
        finally:
            self._board.close()
        self._desk.fail(STOPPED)

    def _step(self) -> None:
        self._let_go()
        self._begin()
        name, scored = next(iter(self._unscored.items()), ("", None))
        order = Order(
            tokens=self._tokens,
            removed=self._removed,
            added=self._added,
            scored=() if scored is None else scored.unscored(),
            begins=scored is not None and scored.begins,
            asks=self._board.begin(),
        )
        self._tokens, self._removed, self._added = [], [], []
        self._orders.give(order)
        if order.asks:
            self._board.post(self._orders.gather())
        outcome = carry_out(order, self._pages)
        self._board.usage = self._pages.usage()
        if scored is not None and outcome.scored_TV is not None:
            self._hear_scores(name, scored, outcome.scored_TV.cpu())
        self._hear(dict(zip(outcome.names, outcome.logits_NV.cpu(), strict=True)))

    def _let_go(self) -> None:
        """Forget those who withdrew."""
        for name in self._desk.withdrawn():
            if self._answers.pop(name, None) is None:  # it ended just then
                continue
            if self._unscored.pop(name, None) is None:
                self._removed.append(name)

    def _begin(self) -> None:
        """Take those who come next."""
        while (place := self._desk.next()) is not None:
            answer = self._answers[place.name] = Answer(place.request, self._tokenizer, self._ends)
            if place.request.scored:
                self._unscored[place.name] = answer
            else:
                self._added.append((place.name, answer.ids))

    def _hear_scores(self, name: str, answer: Answer, logits_TV: Tensor) -> None:
        if (piece := answer.score(logits_TV)) is None:
            return
        del self._unscored[name]
        if not self._say(name, piece):
            self._added.append((name, answer.ids))

    def _hear(self, logits: Mapping[str, Tensor]) -> None:
        for name, logits_V in logits.items():
            answer = self._answers[name]
            piece = answer.take(logits_V)
            self._tokens.append(answer.ids[-1])
            if self._say(name, piece):
                self._removed.append(name)

    def _say(self, name: str, piece: Piece) -> bool:
        """True if that was the last piece."""
        ended = piece.finish is not None
        if ended:
            del self._answers[name]
        self._desk.say(name, piece)
        return ended


def follow(orders: Orders, pages: Pages) -> None:
    """Do what the first rank says, until it says that this is the end."""
    while not (order := orders.receive()).ends:
        if order.asks:
            orders.gather()
        carry_out(order, pages)

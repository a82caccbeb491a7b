"""A client that hears of its requests, in the event loop; when it leaves, their places are free."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Self

from starlette.types import Receive

from narrowcast.serving.desk import ClosedError, Desk, FullError
from narrowcast.serving.requests import Failure, Piece, Request
from narrowcast.serving.web.refused import RefusedError


class Hearing:
    """Requests handed in at `desk`, all together. RefusedError where there is no place for them."""

    def __init__(self, desk: Desk, requests: Sequence[Request]) -> None:
        self._desk, self._loop = desk, asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, Piece | Failure]] = asyncio.Queue()  # no more than `max_new_tokens` each
        if len(requests) > desk.num_places:
            message = f"expected {desk.num_places} answers at most, prompts times n, found {len(requests)}"
            raise RefusedError(400, message, param="n")
        try:
            names = desk.hand_in([(request, partial(self._hear, index)) for index, request in enumerate(requests)])
        except FullError as error:
            message = f"all {desk.num_places} places are taken: try again in a moment"
            raise RefusedError(429, message, code="rate_limit_exceeded") from error
        except ClosedError as error:
            raise RefusedError(503, str(error), code="unavailable") from error
        self._names = dict(enumerate(names))  # of those that are not answered yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._desk.withdraw(list(self._names.values()))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all answers, as they come, each with the number of its request; RefusedError where one fails."""
        while self._names:
            index, said = await self._heard.get()
            if isinstance(said, Failure):
                raise RefusedError(503, said.message, code="unavailable")
            if said.finish is not None:
                del self._names[index]
            yield index, said

    def _hear(self, index: int, said: Piece | Failure) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, said))


async def all_pieces(hearing: Hearing, num_requests: int, receive: Receive) -> list[list[Piece]]:
    """The pieces of every answer; RefusedError, which nobody reads, when the client leaves before."""
    heard: list[list[Piece]] = [[] for _ in range(num_requests)]

    async def listen() -> None:
        async for index, piece in hearing.pieces():
            heard[index].append(piece)

    listening, leaving = asyncio.ensure_future(listen()), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait([listening, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            raise RefusedError(499, "the client left")
        await listening
    finally:
        for task in (listening, leaving):
            task.cancel()
    return heard


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

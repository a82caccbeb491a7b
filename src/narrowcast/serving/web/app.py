"""The routes of the OpenAI API."""

import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from narrowcast.serving.desk import Desk
from narrowcast.serving.requests import Request as Wanted
from narrowcast.serving.web.answers import Chat, Completion, Form
from narrowcast.serving.web.bodies import Body, ChatBody, CompletionBody, refused_by
from narrowcast.serving.web.hearing import Hearing, all_pieces
from narrowcast.serving.web.model import Model
from narrowcast.serving.web.refused import RefusedError

B = TypeVar("B", bound=Body)

MAX_BODY_NBYTES = 4 << 20


def application(desk: Desk, model: Model, *, api_key: str | None, metrics: ASGIApp) -> FastAPI:
    """The API of `model`, whose requests are handed in at `desk`; `metrics` answers /metrics.

    With an `api_key`, /v1 is for those who send it.
    """
    app = FastAPI(title="narrowcast", openapi_url=None)
    app.add_exception_handler(RefusedError, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _no_such_route)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _failed)
    app.include_router(_api(desk, model, api_key))
    app.router.routes.append(Route("/metrics", Served(metrics)))

    @app.get("/health")
    async def health() -> Response:
        status = 200 if desk.closed is None else 503
        return JSONResponse({"status": desk.closed or "ok"}, status_code=status)

    return app


def _api(desk: Desk, model: Model, api_key: str | None) -> APIRouter:
    api = APIRouter(prefix="/v1", dependencies=[] if api_key is None else [Depends(_keeper(api_key))])
    begun = int(time.time())
    about = {"id": model.name, "object": "model", "created": begun, "owned_by": "narrowcast"}
    about |= {"max_model_len": model.max_len}

    @api.get("/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [about]})

    @api.get("/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != model.name:
            raise RefusedError(404, f"model: expected {model.name!r}, found {name!r}", code="model_not_found")
        return JSONResponse(about)

    @api.post("/completions")
    async def completions(request: Request) -> Response:
        body = await _read(request, CompletionBody)
        model.check(body)
        wanted = await model.completions(body)
        return await _answered(request, desk, wanted, Completion(model, body, wanted, echo=body.echo), body)

    @api.post("/chat/completions")
    async def chats(request: Request) -> Response:
        body = await _read(request, ChatBody)
        model.check(body)
        wanted = await model.chats(body)
        return await _answered(request, desk, wanted, Chat(model, body, wanted), body)

    return api


async def _answered(request: Request, desk: Desk, wanted: list[Wanted], form: Form, body: Body) -> Response:
    hearing = Hearing(desk, wanted)
    if body.stream:
        return Events(_events(form, hearing), hearing)
    with hearing:
        return JSONResponse(form.whole(await all_pieces(hearing, len(wanted), request.receive)))


async def _events(form: Form, hearing: Hearing) -> AsyncIterator[str]:
    try:
        async for chunk in form.chunks(hearing.pieces()):
            yield _event(chunk)
    except RefusedError as refusal:  # too late for a status
        yield _event(refusal.to_json())
        return
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class Events(StreamingResponse):
    """A stream of events, whose places are free when it ends, even if it never began."""

    def __init__(self, events: AsyncIterator[str], hearing: Hearing) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._hearing = hearing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._hearing:
            await super().__call__(scope, receive, send)


class Served:
    """An application as a route, which takes one path: a mount would send it on to that with a slash."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _read(request: Request, kind: type[B]) -> B:
    """The body of a request; RefusedError of one that is too large or says something else than it may."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_NBYTES:
            raise RefusedError(413, f"body: expected {MAX_BODY_NBYTES} bytes at most, found more")
    try:
        return kind.model_validate_json(bytes(data))
    except ValidationError as error:
        raise refused_by(error) from error


def _keeper(api_key: str) -> Any:
    expected = f"Bearer {api_key}".encode()

    async def keep(request: Request) -> None:
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            raise RefusedError(
                401, "expected this server's API key in Authorization: Bearer KEY", code="invalid_api_key"
            )

    return keep


async def _refused(_: Request, refusal: RefusedError) -> Response:
    return JSONResponse(refusal.to_json(), status_code=refusal.status)


async def _failed(_: Request, error: Exception) -> Response:
    """Of what nobody expected; the log has it, too."""
    refusal = RefusedError(500, f"this request failed: {type(error).__name__}: {error}")
    return JSONResponse(refusal.to_json(), status_code=refusal.status)


async def _no_such_route(request: Request, error: HTTPException) -> Response:
    refusal = RefusedError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(refusal.to_json(), status_code=error.status_code, headers=error.headers)

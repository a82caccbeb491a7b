"""The OpenAI API over HTTP. FastAPI, pydantic and uvicorn are imported here alone, and only to serve."""

from typing import TYPE_CHECKING

from narrowcast.errors import MissingDependencyError

if TYPE_CHECKING:
    from narrowcast.serving.web.server import Server


def import_server() -> "type[Server]":
    """The class of the server; MissingDependencyError where what it needs is not installed."""
    try:
        from narrowcast.serving.web.server import Server
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name).split(".")[0], "serve") from error
    return Server


__all__ = ["import_server"]

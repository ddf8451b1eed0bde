"""The FastAPI application: routes, error answers, middleware.

Owns no state but `Front`, reachable as `app.state.front`. Invariant: every answer that is not a
success is an OpenAI error object.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import fastapi
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import diptych
from diptych.engine.core.errors import DiptychError, EngineDeadError, ModelNotFoundError
from diptych.server.client import EngineClient
from diptych.server.http.chat import chat_completions
from diptych.server.http.completions import completions
from diptych.server.http.errors import (
    DrainingError,
    InternalError,
    MethodNotAllowedError,
    UnknownUrlError,
)
from diptych.server.http.front import Front
from diptych.server.http.gate import Gate
from diptych.server.http.replies import ModelCard, ModelList
from diptych.server.http.server_info import server_info
from diptych.server.http.settings import HttpSettings
from diptych.server.http.stream import ClientGoneError
from diptych.server.http.tokens import detokenize, tokenize
from diptych.server.text.tokenizer import Tokenizer

_LOG: Final = logging.getLogger(__name__)
_CLIENT_GONE: Final = 499  # seen in metrics only: nobody is there to read it
Handler = Callable[[Front, Request], Awaitable[Response]]


def make_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    settings: HttpSettings,
    meters: memoryview | None = None,
) -> fastapi.FastAPI:
    """Raises ConfigError for settings that cannot work."""
    settings.verify()
    app = fastapi.FastAPI(
        title="Diptych", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    front = Front(client, tokenizer, settings, meters)
    app.state.front = front
    app.add_middleware(Gate, front=front)
    app.add_exception_handler(DiptychError, _operating_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(Exception, _our_bug)
    routes: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/chat/completions", chat_completions),
        ("POST", "/v1/completions", completions),
        ("POST", "/tokenize", tokenize),
        ("POST", "/detokenize", detokenize),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{model:path}", _model),
        ("GET", "/health", _health),
        ("GET", "/ready", _health),
        ("GET", "/ping", _ping),
        ("POST", "/ping", _ping),
        ("GET", "/metrics", _metrics),
        ("GET", "/version", _version),
        ("GET", "/load", _load),
        ("GET", "/server_info", _server_info),
    ]
    for method, path, handler in routes:
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, _bound(handler, front), methods=methods, response_model=None)
    return app


def front_of(app: fastapi.FastAPI) -> Front:
    front = app.state.front
    assert isinstance(front, Front)
    return front


def _bound(handler: Handler, front: Front) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        return await handler(front, request)

    return route


async def _operating_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DiptychError)
    return front_of(request.app).error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path'][:200]}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        refusal = MethodNotAllowedError(f"{where}: use {allowed} here.")
        response = front_of(request.app).error_response(refusal)
        response.headers["Allow"] = allowed
        return response
    return front_of(request.app).error_response(UnknownUrlError(f"Unknown request URL: {where}."))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _our_bug(request: Request, error: Exception) -> Response:
    request_id = str(request.scope.get("diptych.request_id", ""))
    _LOG.error("request %s failed", request_id, exc_info=error)
    response = front_of(request.app).error_response(InternalError(request_id))
    response.headers["X-Request-Id"] = request_id
    return response


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _card(front: Front, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=front.created,
        root=front.settings.model_names[0],
        max_model_len=front.client.info.max_model_len,
    )


async def _server_info(front: Front, request: Request) -> Response:
    return _json(server_info(front))


async def _models(front: Front, request: Request) -> Response:
    return _json(ModelList(data=[_card(front, name) for name in front.settings.model_names]))


async def _model(front: Front, request: Request) -> Response:
    name = request.path_params["model"]
    if name not in front.settings.model_names:
        raise ModelNotFoundError(f"The model {name[:100]!r} does not exist here.", param="model")
    return _json(_card(front, name))


def _verify_health(front: Front) -> None:
    if front.draining:
        raise DrainingError(front.settings.retry_after_s)
    health = front.client.health()
    if not health.ok:
        raise EngineDeadError(f"The engine is not healthy: {health.reason}.")


async def _health(front: Front, request: Request) -> Response:
    _verify_health(front)
    return _json({"status": "ok"})


async def _ping(front: Front, request: Request) -> Response:
    _verify_health(front)
    return _json({"status": "Healthy"})


async def _metrics(front: Front, request: Request) -> Response:
    return Response(front.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _version(front: Front, request: Request) -> Response:
    return _json({"version": diptych.__version__})


async def _load(front: Front, request: Request) -> Response:
    """Requests in flight on this API server, this one not counted."""
    return _json({"server_load": front.in_flight})

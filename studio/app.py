"""The routes: the page, the WebSocket, jobs, saved files, and what watches over servers asks for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.formparsers import MultiPartException

from studio.house import House
from studio.jobs import Job, JobRequest, TooMany
from studio.live import TRY_LATER, Connection
from studio.saving import KINDS
from studio.security import Door, Doorkeeper
from studio.settings import BODY_BYTES
from utils.config import build
from utils.errors import InputError

STATIC = Path(__file__).parent / "static"
_LISTED = 100


def create_app(house: House, on_failure: Callable[[], None]) -> FastAPI:
    """`on_failure` is called if the model cannot be loaded; `house.failure` says why."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        house.open(on_failure)
        yield
        await house.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    doorkeeper = Doorkeeper(house.settings)
    app.add_middleware(Door, keeper=doorkeeper)
    app.exception_handler(AnyHTTPException)(_refused)
    app.exception_handler(InputError)(_bad_input)

    def with_token(request: Request) -> None:
        if not doorkeeper.admits(request.headers):
            raise HTTPException(401, "token: send it as `Authorization: Bearer TOKEN`")

    _add_watch(app, house, with_token)
    _add_jobs(app, house, with_token)
    _add_saved(app, house, with_token)
    _add_live(app, house, doorkeeper)
    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app


def _add_watch(app: FastAPI, house: House, with_token: Callable[[Request], None]) -> None:
    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        return PlainTextResponse("ready\n") if house.loaded.is_set() else PlainTextResponse("loading\n", 503)

    @app.get("/metrics", dependencies=[Depends(with_token)])
    async def metrics() -> Response:
        return Response(house.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_live(app: FastAPI, house: House, doorkeeper: Doorkeeper) -> None:
    @app.websocket("/ws")
    async def live(socket: WebSocket) -> None:
        if house.connections >= house.settings.max_viewers:
            await socket.close(TRY_LATER, "there are too many viewers; come back later")
            return
        with house.one_more_connection():
            await Connection(socket, house, doorkeeper).run()


def _add_jobs(app: FastAPI, house: House, with_token: Callable[[Request], None]) -> None:
    guarded = [Depends(with_token), Depends(lambda: _require_loaded(house))]

    def wanted(video_id: str) -> Job:
        job = house.parts.jobs.get(video_id)
        if job is None:
            raise HTTPException(404, "id: there is no such video")
        return job

    @app.post("/v1/videos", dependencies=guarded)
    async def create(request: Request) -> dict[str, object]:
        return house.parts.jobs.add(build(JobRequest, await _body(request))).as_object()

    @app.get("/v1/videos", dependencies=guarded)
    async def listed() -> dict[str, object]:
        return {"object": "list", "data": [job.as_object() for job in house.parts.jobs.newest(_LISTED)]}

    @app.get("/v1/videos/{video_id}", dependencies=guarded)
    async def get(video_id: str) -> dict[str, object]:
        return wanted(video_id).as_object()

    @app.get("/v1/videos/{video_id}/content", dependencies=guarded)
    async def content(video_id: str) -> FileResponse:
        job = wanted(video_id)
        if job.status != "completed":
            raise HTTPException(409, f"status: the video is {job.status}; wait until it is completed")
        path = house.parts.jobs.content(job)
        if not path.is_file():
            raise HTTPException(410, "id: the file of this video is gone from the server; ask for it anew")
        return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4")

    @app.delete("/v1/videos/{video_id}", dependencies=guarded)
    async def remove(video_id: str) -> dict[str, object]:
        house.parts.jobs.remove(wanted(video_id).id)
        return {"id": video_id, "object": "video.deleted", "deleted": True}


def _add_saved(app: FastAPI, house: House, with_token: Callable[[Request], None]) -> None:
    guarded = [Depends(with_token), Depends(lambda: _require_loaded(house))]

    @app.get("/v1/saved/{name}.{kind}", dependencies=guarded)
    async def saved(name: str, kind: str) -> FileResponse:
        path = house.parts.keeper.path(name, kind)
        if path is None:
            raise HTTPException(404, "name: there is no such file")
        return FileResponse(path, media_type=KINDS[kind], filename=path.name)


def _require_loaded(house: House) -> None:
    if not house.loaded.is_set():
        raise HTTPException(503, "the model is still being loaded; try again in a moment")


async def _body(request: Request) -> dict[str, object]:
    """A job as JSON or as a form. Raises InputError for what is neither, HTTPException for what is too long."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > BODY_BYTES:
            raise HTTPException(413, f"body: more than {BODY_BYTES >> 10} KiB; a prompt and a few settings are enough")
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            content: Any = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"body: is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise InputError("body: expected an object with a prompt")
        return content
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise InputError(f"content-type: {kind} is neither application/json nor a form")
    return await _form(request, bytes(data))


async def _form(request: Request, data: bytes) -> dict[str, object]:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": data, "more_body": False}

    try:
        form = await Request(request.scope, receive).form(max_files=0, max_fields=20)
    except (MultiPartException, AnyHTTPException) as error:
        raise InputError(f"body: is no form that can be read ({getattr(error, 'detail', error)})") from error
    return dict(form)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return _error(error.status_code, str(error.detail))


async def _bad_input(request: Request, error: Exception) -> Response:
    return _error(429 if isinstance(error, TooMany) else 400, str(error))


def _error(status: int, message: str) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)

"""The HTTP front on Ray Serve: everything of web.py over the replicas of one bundle, which a rollout exchanges.

It listens on the service's port itself. Serve's own proxy in front would cost more than all of the gateway does, and
Ray's direct ingress does not get its port back when a gateway was killed. Several gateways of one machine share the
port (SO_REUSEPORT), so a new one is there before an old one goes.
"""

import asyncio
import socket
from typing import Any

import uvicorn
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Scope, Send

from nanochat.tokenizer import Vocabulary
from pipelines.service.failover import Continued
from pipelines.service.keys import Keys
from pipelines.service.replicas import Replicas
from pipelines.service.turns import take_short_turns
from pipelines.service.web import make_app

BACKLOG = 1_024  # connections that wait to be accepted
KEEP_ALIVE_S = 75  # longer than the 60 s after which usual balancers close an idle connection


class Gateway:
    """Holds the vocabulary, so replicas see tokens only. A request stays with the bundle that it began with.

    drain_s: what answers that run have when it is told to end.
    """

    def __init__(self, host: str, port: int, drain_s: float, *replicas: DeploymentHandle) -> None:
        take_short_turns()
        # The handles are there because Serve deploys what a deployment is bound to.
        self._host, self._port, self._drain_s = host, port, drain_s
        self._told: dict[str, Any] = {}
        self._app: ASGIApp  # by reconfigure
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None]

    async def reconfigure(self, told: dict[str, Any]) -> None:
        """Called by Serve when it begins, and at each rollout. told["replica"]: who answers from now on."""
        if (told["replica"], told["keys"]) != (self._told.get("replica"), self._told.get("keys")):
            handle = serve.get_deployment_handle(told["replica"])
            bundle = await handle.bundle.remote("")
            vocab = await asyncio.to_thread(Vocabulary.load, bundle.files)
            keys = None if told["keys"] is None else Keys.of(told["keys"])
            self._app = make_app(Continued(Replicas(handle)), vocab, bundle.card, keys)
        self._told = told
        if self._server is None:
            self._listen()

    async def told(self) -> dict[str, Any]:
        """What `reconfigure` was told last."""
        return self._told

    async def check_health(self) -> None:
        """Serve asks this every few seconds and replaces the gateway if it raises."""
        if self._server is not None and self._serving.done():
            raise RuntimeError(f"nobody listens on port {self._port} any more")

    async def __del__(self) -> None:
        """Called by Serve, which waits for it: takes no connection any more, and ends when the last is done."""
        if self._server is not None:
            self._server.should_exit = True
            await self._serving

    def _listen(self) -> None:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family)
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind((self._host, self._port))
        settings = uvicorn.Config(
            self._dispatch(),
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=self._drain_s,  # type: ignore[arg-type]  # asyncio takes parts of seconds
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        self._server = uvicorn.Server(settings)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    def _dispatch(self) -> ASGIApp:
        async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:  # uvicorn takes a method for ASGI 2
            await self._app(scope, receive, send)

        return dispatch

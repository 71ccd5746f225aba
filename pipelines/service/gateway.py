"""The HTTP service behind Ray Serve: everything of web.py over replicas that may die."""

from collections.abc import AsyncGenerator
from contextlib import suppress

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from nanochat.files import Files
from nanochat.tokenizer import Vocabulary
from pipelines.service.failover import Continued
from pipelines.service.protocol import ApiError, Card, ReplicaLostError
from pipelines.service.web import make_app

STATS_TIMEOUT_S = 5


class Replicas:
    """A Backend: hands each request to one of the replicas."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._all = handle.options(stream=True), handle

    async def generate(self, tokens: list[int], params: SampleParams) -> AsyncGenerator[Output, None]:
        """As Backend.generate."""
        response = self._handle.generate.remote(tokens, params)
        try:
            async for output in response:
                yield output
        except BackPressureError as error:
            raise ApiError(429, "too many requests wait already; ask again in a moment", code="overloaded") from error
        except RayTaskError as error:  # what the replica's own code raised
            raise error.cause from error
        except (RayError, RayServeException) as error:
            raise ReplicaLostError(type(error).__name__) from error
        finally:
            with suppress(RayServeException):  # said again for a request that was never let in
                response.cancel()  # nothing happens if it has ended

    async def stats(self) -> list[Stats]:
        """As Backend.stats; a replica that does not answer is left out."""
        try:
            answers = await self._all.broadcast("stats").results_async(
                timeout_s=STATS_TIMEOUT_S, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError) as error:
            raise ReplicaLostError(f"no replica says its load: {type(error).__name__}") from error
        return [answer for answer in answers if isinstance(answer, Stats)]


@serve.ingress()
class Gateway:
    """One HTTP front; holds the vocabulary, so replicas see tokens only."""

    def __init__(self, replica: DeploymentHandle, files: Files, card: Card) -> None:
        self._backend, self._files, self._card = Continued(Replicas(replica)), files, card

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve, which has this name for it, where the gateway runs."""
        return make_app(self._backend, Vocabulary.load(self._files), self._card)

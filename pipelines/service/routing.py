"""Which replica a call of Ray Serve goes to: where it is told.

Every method has a replica's id as its first argument, or "": any. If that replica is gone the call goes to another,
which sees by the id that it is not meant. `submit(replica, client, request, refused)` may be answered by any: where it
names none that is there, the Ledger of this process places it. Nothing waits for a replica: how full it is, it says
itself when it is asked.
"""

import asyncio
import random
from typing import TYPE_CHECKING, Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from pipelines.service.prefixes import ledger_of
from pipelines.service.protocol import ReplicaLostError

if TYPE_CHECKING:
    from pipelines.service.calls import Request

# Serve pickles the class with this module's globals: what is shared with the gateway has to be another module's.


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Use it with `max_ongoing_requests` so large that no replica reaches it: Serve would ask it again and again.

    All methods are called by the loop that Serve routes on: the gateway's own or, by default, one in another thread.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger = ledger_of(self._deployment_id.app_name, self._deployment_id.name)
        self._by_id: dict[str, RunningReplica] = {}
        self._leaving: dict[str, RunningReplica] = {}  # they end what they have begun, and are told of it

    def initialize_state(self, kv_tokens: int) -> None:
        """Called by Serve with request_router_kwargs. kv_tokens: of a replica's cache."""
        self._ledger.size(kv_tokens)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called when the controller has started or stopped some."""
        before = self._by_id
        super().update_replicas(replicas)
        self._renew()
        gone = {name: replica for name, replica in before.items() if name not in self._by_id}
        self._leaving = dict([*self._leaving.items(), *gone.items()][-len(self._by_id) - 8 :])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called when a call has found out."""
        super().on_replica_actor_died(replica_id)
        self._leaving.pop(replica_id.unique_id, None)
        self._renew()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """As RequestRouter; not asked, since the method below takes over."""
        return [candidate_replicas]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Instead of Serve's queue, where one replica that does not answer keeps calls to others waiting.

        Serve's CapacityQueueRouter replaces the same method. Raises ReplicaLostError where there is no replica that
        could refuse a call for another; a call for any waits for one.
        """
        if is_retry:  # it could not be reached, or is about to end
            await asyncio.sleep(self.initial_backoff_s)
        name = _name(pending_request)
        if pending_request.metadata.call_method == "submit":
            if not is_retry and (found := self._by_id.get(name)):
                return found
            while (found := self._place(*pending_request.args[1:])) is None:
                await self._wait()
            return found
        if name and not is_retry and (found := self._by_id.get(name) or self._leaving.get(name)):
            return found
        if name and not self._by_id:
            raise ReplicaLostError(f"replica {name} is gone")
        while not self._by_id:
            await self._wait()
        others = [replica for other, replica in self._by_id.items() if other != name]
        return random.choice(others or list(self._by_id.values()))

    async def _wait(self) -> None:
        """Until there is a replica."""
        self._replicas_updated_event.clear()
        await self._replicas_updated_event.wait()

    def _place(self, client: str, request: "Request", refused: frozenset[str]) -> RunningReplica | None:
        self._ledger.update(self._by_id)  # another handle's router may have heard of a change that this one has not
        params = request.params
        name = self._ledger.place((client, request.number), request.tokens, params.max_tokens, params.n, refused)
        return None if name is None else self._by_id[name]

    def _renew(self) -> None:
        self._by_id = {replica_id.unique_id: replica for replica_id, replica in self._replicas.items()}
        self._ledger.update(self._by_id)


def _name(request: PendingRequest) -> str:
    """The replica that a call is for."""
    return request.args[0] if request.args and isinstance(request.args[0], str) else ""

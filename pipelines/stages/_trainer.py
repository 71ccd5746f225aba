"""Ray Train's trainer without what our training loops have no use for.

Each helper is a process: a second or more of every start on two cores, 70 MB, and a hundred wake-ups a second, each of
which stops a thread of the training that the others then wait for. So the controller is a thread of the driver, which
has nothing else to do, and what is left of its helpers ends when the workers train.
"""

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import Result, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, WorkerGroupContext

# One hands out datasets of Ray Data, of which our loops take none; the other gives the resources of a killed controller
# back, which Ray does when the job ends, and ours ends then.
SPARED = (DatasetsCallback, PlacementGroupCleanerCallback)
END_S = 10.0  # for a controller to let go of its workers

T = TypeVar("T")


class LeanTrainer(TorchTrainer):  # type: ignore[misc]  # Ray says nothing of its types
    """A TorchTrainer that starts no process but its workers, and can be asked for what they say.

    Loops must not call `ray.train.report`, which meets in a helper that has ended. Who interrupts `fit` calls `end`.
    """

    def __init__(self, *args: Any, **told: Any) -> None:
        super().__init__(*args, **told)
        self._group = _Group()
        self._failures = _Failures(self.run_config.failure_config)
        self._ended = threading.Event()  # a thread whose join is interrupted counts as ended in Python 3.11
        self._ended.set()
        self._stop: Callable[[], None] = lambda: None

    def ask_first(self, question: Callable[[], T]) -> T | None:
        """Calls it in the process of rank 0, beside the training. None while there is no such process."""
        first = self._group.first
        if first is None:
            return None
        # The process bears this name meanwhile, in `ps` and on the dashboard.
        name = f"RayTrainWorker.{question.__name__.strip('_')}"
        try:
            answer: T = ray.get(first.actor.execute.options(name=name).remote(question), timeout=END_S)
        except (RayError, TimeoutError):  # it has just been lost, or it hangs and will be
            return None
        return answer

    def let_end(self, timeout_s: float) -> None:
        """From now on no worker is begun again; waits until those that there are have ended."""
        self._failures.final = True
        self._ended.wait(timeout_s)

    def end(self) -> None:
        """Ends the workers, if there still are any."""
        self._stop()
        self._ended.wait(END_S)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        ours = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, SPARED)]
        return [*ours, self._group]

    def _initialize_and_run_controller(self, **told: Any) -> Result:
        if not self.scaling_config.elasticity_enabled:
            told["scaling_policy"] = _Placed(self.scaling_config)
        controller = _Controller(**told | {"failure_policy": self._failures})
        _keep_to_files(logging.getLogger("ray.train"))
        loop = asyncio.new_event_loop()
        running = loop.create_task(controller.run())

        def run() -> None:
            try:
                loop.run_until_complete(asyncio.wait([running]))
                if workers := controller.get_worker_group():  # it was stopped
                    with suppress(Exception):  # Ray may have ended too
                        workers.abort()
                loop.close()
            finally:
                self._group.forget()
                self._ended.set()

        def stop() -> None:
            with suppress(RuntimeError):  # the loop is closed: all has ended
                loop.call_soon_threadsafe(running.cancel)

        self._stop = stop
        self._ended.clear()
        threading.Thread(target=run, name="train-controller", daemon=True).start()
        self._ended.wait()
        running.result()
        return controller.get_result()


class _Group(WorkerGroupCallback):  # type: ignore[misc]
    """Knows the first of the workers that there are, and tells all of a node that will be taken away."""

    def __init__(self) -> None:
        self.first: Worker | None = None
        self._watcher: PreemptionWatcher | None = None

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        self.forget()

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        workers = worker_group.get_workers()
        self.first = workers[0]
        ranks = defaultdict(list)
        for rank, worker in enumerate(workers):
            ranks[worker.metadata.node_id].append(rank)
        actors = {rank: worker.actor for rank, worker in enumerate(workers)}
        self._watcher = PreemptionWatcher(ranks, worker_actors_by_rank=actors)  # a thread

    def after_worker_group_training_start(self, worker_group: WorkerGroup) -> None:
        ray.kill(worker_group.get_worker_group_state().sync_actor)  # where workers meet in `ray.train.report`

    def before_worker_group_shutdown(self, worker_group: WorkerGroup) -> None:
        self.forget()

    def before_worker_group_abort(self, worker_group_context: WorkerGroupContext) -> None:
        self.forget()

    def forget(self) -> None:
        self.first = None
        if self._watcher:
            self._watcher._stop_event.set()


class _Failures(DefaultFailurePolicy):  # type: ignore[misc]
    """Ray's own, but once `final` no worker is begun again; and one that is lost just as it begins is, as any other."""

    final = False

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        failure = getattr(training_failed_error, "controller_failure", None)
        if isinstance(failure, RayActorError):
            training_failed_error = WorkerGroupError(str(failure), {0: failure})
        return FailureDecision.RAISE if self.final else super().make_decision(training_failed_error)


class _Placed(FixedScalingPolicy):  # type: ignore[misc]
    """A number of workers whose placement group alone tells an autoscaler what they need.

    Ray's own says it to a coordinator too, which would divide a cluster between Ray Data and Ray Train of one job.
    """

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class _Workers(WorkerGroup):  # type: ignore[misc]
    """Whose controller is no actor."""

    def _init_train_context_on_workers(self, workers: list[Worker], meeting: Any, more: dict[str, list[Any]]) -> None:
        common = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": meeting,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "controller_actor": None,
        }
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    distributed_context=worker.distributed_context,
                    **common,
                    **{name: values[rank] for name, values in more.items()},
                )
                for rank, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _Workers

    def __init__(self, **told: Any) -> None:
        super().__init__(**told)
        spread = self._worker_group_callbacks_to_propagate
        spread[:] = [callback for callback in spread if not isinstance(callback, PreemptionCallback)]  # of a process


def _keep_to_files(log: logging.Logger) -> None:
    """What the controller says goes to Ray's folder of logs alone: errors reach the user with `fit`."""
    for handler in list(log.handlers):
        if handler.name == "console":
            log.removeHandler(handler)

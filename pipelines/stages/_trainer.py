"""Ray Train's trainer without what our training loops have no use for."""

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback

# Each has a process of its own: seconds of a start on two cores, 70 MB, and a hundred wake-ups a second beside the
# training. One hands out datasets of Ray Data, of which our loops take none; the other gives the resources of a killed
# controller back, which Ray does when the job ends, and ours ends then.
SPARED = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(TorchTrainer):  # type: ignore[misc]  # Ray says nothing of its types
    """A TorchTrainer that starts no helpers but its controller and the one its workers meet at."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, SPARED)]

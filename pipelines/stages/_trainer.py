"""Ray Train's trainer without what our training loops have no use for.

Each helper is a process: a second or more of every start on two cores, 70 MB, and a hundred wake-ups a second beside
the training.
"""

from typing import Any

from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

# One hands out datasets of Ray Data, of which our loops take none; the other gives the resources of a killed controller
# back, which Ray does when the job ends, and ours ends then.
SPARED = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(TorchTrainer):  # type: ignore[misc]  # Ray says nothing of its types
    """A TorchTrainer that starts no helpers but its controller and the one its workers meet at."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, SPARED)]

    def _initialize_and_run_controller(self, **told: Any) -> Result:
        if not self.scaling_config.elasticity_enabled:
            told["scaling_policy"] = _Placed(self.scaling_config)
        return super()._initialize_and_run_controller(**told)


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

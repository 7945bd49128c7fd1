"""Actors that let a stock ndif 0.1.2 serve models from a CPU.

ndif loads its actor classes by import path (NDIF_MODEL_IMPORT_PATH, NDIF_CONTROLLER_IMPORT_PATH). These subclasses
replace only what cannot run here: the calls into torch.cuda, and one argument that nnsight 0.8.1 no longer takes.
Queue, execution, time limit and responses are ndif's own.
"""

import gc
from typing import Any

import ray
from ndif.common.schema.request import BackendRequestModel
from ndif.services.ray.deployments.controller.cluster import evaluator
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import CheckpointInfo, Remotable


class CPUModel(BaseModelDeployment):
    """The model in this process's memory. The stock class synchronises with CUDA after loading and after each job."""

    CACHEABLE = False  # nothing to gain from parking CPU weights on the CPU: evict instead

    def load_from_disk(self) -> HuggingFaceModel:
        """The model on the CPU, without gradients, as the stock class has it on its GPUs."""
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def cleanup(self) -> None:
        """Forget the request that ended."""
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


class CPUSandboxModel(SandboxModelDeployment, CPUModel):
    """Each block runs in a fresh process, as for the users of a shared NDIF.

    ndif trusts every request when it has no user database, and runs trusted blocks beside the model. Here nobody is.
    """

    def open_pool(self, pool_size: int | None = None, peers: int = 1) -> None:
        """Start runner processes that know the hub of this server."""
        # The runner builds a weightless model of its own. Without the hub's address it would ask the real hub for it;
        # if that fails, it goes on with None for every module and tokenizer.
        host.RUNNER_ENV += ("HF_ENDPOINT",)
        super().open_pool(pool_size, peers)

    async def run(self, request: BackendRequestModel) -> None:
        """Execute a request in a runner, whatever it says of itself."""
        request.trusted = False
        await super().run(request)


class _Checkpoints:
    """nnsight reads trust_remote_code from the model key; ndif 0.1.2 passes it as an argument too."""

    @staticmethod
    def describe_checkpoint(model_key: str, dtype: str, *, trust_remote_code: bool) -> CheckpointInfo:
        return Remotable.describe_checkpoint(model_key, dtype)

    @staticmethod
    def max_tp_size(model_key: str, *, trust_remote_code: bool) -> int | None:
        return Remotable.max_tp_size(model_key)


class CPUController(_ControllerActor):
    """The stock controller with a working description of checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        evaluator.Remotable = _Checkpoints
        super().__init__(*args, **kwargs)


# The same resources as the stock actors ask for.
CPUModelActor = ray.remote(num_cpus=1, max_restarts=-1)(CPUModel)
CPUSandboxModelActor = ray.remote(num_cpus=1, max_restarts=-1)(CPUSandboxModel)
CPUControllerActor = ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})(CPUController)

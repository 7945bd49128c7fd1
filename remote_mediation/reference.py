"""How far a run in another precision lies from float32, where it ran on a server too.

A server holds its model in one precision. A sample of the outcomes is measured again on this machine in float32, where
the same weights are here and fit; where they do not, `run.json` says why there is no such number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from remote_mediation.config import StudyConfig
from remote_mediation.engine.backend import Backend
from remote_mediation.engine.budget import weight_bytes
from remote_mediation.engine.fit import memory_here
from remote_mediation.errors import MediationError
from remote_mediation.models import weights_here
from remote_mediation.result import Analysis
from remote_mediation.runner import Watch
from remote_mediation.sites import ModelInfo, family_of
from remote_mediation.store import Store
from remote_mediation.study import measure_precision

# Share of this machine's memory that a reference's weights may take.
_SHARE = 0.5


def compare_with_float32(
    store: Store,
    config: StudyConfig,
    info: ModelInfo,
    load: Callable[[StudyConfig], Backend],
    watch: Watch | None = None,
    more: Sequence[Analysis] = (),
) -> None:
    """Note in `run.json` how far a run lies from float32 (`measure_precision`), or why that is not known.

    load: makes the local backend of settings.
    """
    if why := _without_float32(config):
        store.save_record({**store.record(), "deviation_from_float32": {"missing": why}})
        return
    exact = config.model_copy(update={"dtype": "float32", "backend": "local"})
    if config.backend == "local":
        measure_precision(store, load(exact), watch, more)
        return
    try:
        missing = _lacking(config, info)
        reference = None if missing else load(exact)
    except MediationError as error:
        missing, reference = str(error), None
    if reference is not None and _others(reference, store.record().get("served", {}), config.dtype):
        missing = "the weights on this machine are others than the server's"
    if reference is None or missing:
        store.save_record({**store.record(), "deviation_from_float32": {"missing": missing}})
    else:
        measure_precision(store, reference, watch, more)


def _without_float32(config: StudyConfig) -> str:
    """Why a model whose weights are quantised is not compared; empty where it is: nf4 with nf4, by its products."""
    if config.load.quantization == "int8":
        return "weights in int8 are multiplied in int8, so that there are no products in float32"
    if config.load.quantization and config.dtype == "float32":
        return f"products are in float32; what weights in {config.load.quantization} change is not measured"
    return ""


def _lacking(config: StudyConfig, info: ModelInfo) -> str:
    """Why this machine cannot run the model in float32; empty where it can."""
    if not weights_here(config.model, config.revision):
        return "its weights are not on this machine"
    needed, most = weight_bytes(info, "float32"), _SHARE * memory_here()
    if config.max_memory is not None:
        most = min(most, config.max_memory * 1e9)
    if needed > most:
        return f"in float32 its weights take {needed / 1e9:.1f} GB, and {most / 1e9:.1f} GB may be taken here"
    return ""


def _others(reference: Backend, served: Mapping[str, str], dtype: str) -> bool:
    """Whether a server's weights, as far as it shows them, are none that these become in its precision."""
    import torch

    from remote_mediation.engine import program

    blocks = program.module_at(reference.model, family_of(reference.info.family).blocks)
    first = program.first_numbers(reference.model, blocks)
    rounded = program.fingerprint(first.to(getattr(torch, dtype)).float())
    return bool(served.get("weights")) and served["weights"] != program.hexadecimal(int(rounded))

"""How a local model is brought into memory, beyond precision and device: quantised or not, and over which devices.

Only what transformers, accelerate and bitsandbytes do themselves; what is asked for here is made sure of after loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Quantization = Literal["", "nf4", "int8"]
Attention = Literal["", "eager", "sdpa"]
Spread = Literal["", "auto", "balanced", "sequential"]
# Where weights are kept that no device holds: they are read while their layer runs.
DISK = "disk"
# Bytes of a weight of a linear layer: 4 bits and a float32 scale for 64 weights (arXiv 2305.14314,
# section 3), or 8 bits and a scale for a row of the matrix (arXiv 2208.07339, section 2.1).
QUANTISED_BYTES: Mapping[Quantization, float] = {"nf4": 0.5 + 4 / 64, "int8": 1.0}


class Loading(NamedTuple):
    """What `[load]` of a study asks for."""

    spread: Spread = ""
    """How transformers shares the model out over devices; empty for no sharing, or for `places`."""
    places: tuple[tuple[str, str | int], ...] = ()
    """Modules, by path, and the device of each: its number, its name, or `disk`."""
    max_memory: tuple[tuple[str | int, str | int], ...] = ()
    """Most memory of each device, by its number or name."""
    quantization: Quantization = ""
    """How weights of linear layers are held, by bitsandbytes; empty as the checkpoint has them."""
    attention: Attention = ""
    """Implementation of the attention; empty for transformers' choice."""

    @property
    def shared_out(self) -> bool:
        """Whether the model may stand on several devices."""
        return bool(self.spread or self.places)

    def device_map(self) -> str | dict[str, str | int]:
        """The same as transformers takes it."""
        return self.spread or dict(self.places)


def placed(device_map: Mapping[str, Any]) -> str:
    """Where a model stands, in words: `5 modules on cpu, 2 on disk`."""
    devices = [str(device) for device in device_map.values()]
    counts = [f"{devices.count(device)} modules on {device}" for device in dict.fromkeys(devices)]
    return ", ".join([*counts[:1], *(one.replace(" modules", "") for one in counts[1:])])


PLAIN = Loading()
"""As transformers does it when it is asked for nothing."""

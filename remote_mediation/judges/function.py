"""`python:package.module:function`: a function of the user's is the judge."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from remote_mediation.errors import JudgeError
from remote_mediation.judges.base import what_and_where


@dataclass(frozen=True)
class FunctionJudge:
    """A function of the user's; what it returns is checked."""

    name: str
    function: Callable[[list[str], list[str]], Any]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """What the function says of each answer."""
        try:
            found = self.function(list(prompts), list(answers))
        except Exception as error:
            raise JudgeError(f"judge {self.name!r} failed with {what_and_where(error)}; mend the function") from error
        if isinstance(found, str | bytes | Mapping | AbstractSet) or not hasattr(found, "__len__"):
            kind = type(found).__name__
            raise JudgeError(f"judge {self.name!r} returned {kind}; return a list with a bool, 0 or 1 per answer")
        if len(found) != len(answers):
            raise JudgeError(
                f"judge {self.name!r} gave {len(found)} verdicts for {len(answers)} answers; return one per answer"
            )
        return [self._verdict(value, number) for number, value in enumerate(found, start=1)]

    def _verdict(self, value: Any, number: int) -> bool:
        try:
            return {0.0: False, 1.0: True}[math.nan if isinstance(value, str | bytes) else float(value)]
        except (TypeError, ValueError, KeyError):
            raise JudgeError(
                f"judge {self.name!r} gave {value!r} as verdict {number}; return True, False, 1 or 0, such as a score "
                "compared with a threshold"
            ) from None


def load_function(spec: str, rest: str) -> FunctionJudge:
    """A judge by its spec; rest: package.module:function.

    Raises:
        JudgeError: no such module or function.
    """
    module_name, colon, name = rest.partition(":")
    if not (colon and module_name and name):
        raise JudgeError(f"judge {spec!r} names no function; write python:package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises as it is loaded
        raise JudgeError(
            f"cannot import module {module_name!r} of judge {spec!r}: {what_and_where(error)}; is its folder on "
            "PYTHONPATH?"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        kind = "has no" if function is None else "holds a value, not a function, as"
        raise JudgeError(f"module {module_name!r} of judge {spec!r} {kind} {name!r}; name a function in it")
    return FunctionJudge(spec, function)

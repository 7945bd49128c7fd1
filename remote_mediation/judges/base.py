"""What a judge is, and what the judges share: how an error of foreign code is said in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from remote_mediation.errors import JudgeError
from remote_mediation.fetch import located

BATCH = 16
"""Answers that a model reads at once."""


class Judge(Protocol):
    """Says of each answer whether it complies with its prompt (see the package's docstring)."""

    @property
    def name(self) -> str:
        """The spec it was made from, for tables."""
        ...

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """One verdict per answer; prompts and answers are equally many."""
        ...


@runtime_checkable
class FittedJudge(Judge, Protocol):
    """A judge that was fitted to the built-in labelled answers: none may be judged by what was fitted to it."""

    def without(self, category: str) -> Judge:
        """The same judge, fitted to the answers of all other categories."""
        ...


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def what_and_where(error: Exception) -> str:
    """An error of a user's code, with the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if last.filename.startswith("<") else f" ({Path(last.filename).name}, line {last.lineno})"
    return f"{type(error).__name__}: {first_line(error)}{where}"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' own reports while a model is loaded: ours say in one line what a model lacks."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def refuse_other_weights(spec: str, name: str, model: Any, loaded: Mapping[str, Any]) -> None:
    """Refuse a judge's model whose files lack weights, or hold codes of weights that its configuration does not name.

    loaded: what transformers says of loading. A sentence encoder needs no pooler.

    Raises:
        JudgeError: with the first of them.
    """
    from remote_mediation.engine.stored import refusable_codes

    if lacking := [key for key in sorted(loaded["missing_keys"]) if "pooler" not in key]:
        raise JudgeError(
            f"model {name!r} of judge {spec!r} lacks {lacking[0]}, which would be random; give the whole model"
        )
    if getattr(model.config, "quantization_config", None):
        return
    if codes := refusable_codes(Path(located(name)), model, loaded["unexpected_keys"]):
        raise JudgeError(
            f"model {name!r} of judge {spec!r} holds {codes}, and its config.json has no quantization_config that says "
            "what these codes stand for; give weights that are not quantised"
        )

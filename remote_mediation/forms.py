"""What commands print with `--json`: one object each, with the keys that stand here and no others.

A form says of every key what it means; where a key holds records, the form of one record stands in its place. Data go
through their form before they are printed, so a key that is not documented here cannot be printed, and one that is
cannot be missing. Numbers have all their digits, and what is not known is null. `guide` makes reports/guide/json.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

Form = Mapping[str, Any]
"""By key its meaning, or the form of what it holds: one record, or a list of them."""

INTERVAL: Form = {
    "value": "the number",
    "low": "lower end of its 95% interval",
    "high": "upper end",
    "n_pairs": "pairs that it rests on",
    "n_clusters": "clusters of these pairs",
    "reason": "why a number is null, or why to read it with care",
}
VERDICT: Form = {
    "label": "how the claim is called",
    "claim": "in words",
    "said": "the verdict, with what qualifies it",
    "why": "the reason",
    "shares": {
        "measure": "what was swapped, or read",
        "direction": "nie, tie, both, or empty",
        "of": "what it is a share of",
        "harm": INTERVAL,
        "placebo": INTERVAL,
        "beta_harm": "slope of the effect on TE over pairs",
        "beta_placebo": "the same of the placebo",
    },
}
RUN: Form = {
    "model": "hub id or folder",
    "dtype": "precision",
    "backend": "local or ndif",
    "outcome": "what Y is",
    "unit": "of effects",
    "total": {**INTERVAL, "p": "sign-flip p"},
    "verdicts": VERDICT,
    "sections": {"name": "for `show`", "title": "in the report", "finding": "in a line, as Markdown"},
    "identities": {
        "name": "what holds by construction",
        "n": "measurements it was checked on",
        "largest": "largest deviation, in the unit of effects",
    },
    "report": "path of report.md",
}
QUALITY: Form = {
    "judge": "its name",
    "n": "labelled answers",
    "harmful": "of these, labelled harmful",
    **dict.fromkeys(("accuracy", "recall", "specificity", "kappa"), INTERVAL),
}
FORMS: Mapping[str, Form] = {
    "run": RUN,
    "extend": RUN,
    "report": RUN,
    "show": RUN,
    "show SECTION": {
        "name": "of the section",
        "title": "in the report",
        "finding": "in a line, as Markdown",
        "did": "what was done, and on which pairs",
        "details": "what the intervals allow to say, as Markdown",
        "tables": {
            "header": "names of columns",
            "rows": "cells as the report has them; the CSV files have all digits",
            "notes": "what is below the table",
        },
    },
    "check-run": {
        "whole": "whether every file is",
        "files": {"name": "path in the run folder", "whole": "whether it is", "detail": "what is wrong with it"},
    },
    "export": {"folder": "where", "files": "paths that were written"},
    "plan": {
        "model": "hub id or folder",
        "analyses": "names",
        "pairs": "that can be run",
        "refused": "pairs that cannot",
        "counted": "pairs that were counted, the others being taken to be like them",
        "rows": "forward runs with a mediator overwritten, of the first wave",
        "later": {
            "analysis": "that asks for more, at most:",
            "rows": "rows",
            "flops": "operations",
            "down": "bytes that come back",
        },
        "jobs": "of the first wave",
        "flops": "operations of all",
        "weights": "bytes of the model",
        "running": "bytes of the weights that run for a token",
        "batch": "bytes of the largest batch's activations",
        "held": "bytes of what is kept of pairs and rows",
        "memory": "peak bytes where the model runs on this machine's CPU",
        "seconds": "on this machine, at the speed of its matrix products",
        "up": "bytes sent to a server for the first wave",
        "down": "bytes that come back, of all",
    },
    "pairs check": {
        "usable": {
            "id": "of the pair",
            "cluster": "its component",
            "tokens_x0": "of the harmless prompt",
            "tokens_x1": "of the harmful one",
            "first": "tokens before the edit",
            "after": "tokens behind the edit",
            "post": "tokens behind the user's text",
        },
        "refused": {"id": "of the pair", "reason": "why it cannot be run"},
        "notes": "how lists were read, what to take care of, and whether placebos are like harmful prompts",
    },
    "pairs check --show": {"lines": "the pair as the model gets it"},
    "pairs convert": {"pairs": "how many", "file": "that was written"},
    "selfcheck": {
        "passed": "whether all did",
        "cases": {
            "case": "its name",
            "about": "what was planted",
            "seed": "of model and study",
            "claims": "numbers of the five claims, then names of rivals, where their truth is known",
            "truth": "what has to be said of each",
            "said": "what was said",
            "why": "why it was said",
            "gates": "late neurons that gate harm, as layer and unit",
            "missed": "those of them that were not found",
            "passed": "whether all is true",
        },
    },
    "selfcheck --published": {
        "passed": "whether no number is off, as far as any could be measured",
        "studies": {
            "study": "its folder's name",
            "model": "that the numbers are of",
            "absent": "why the model could not be had; empty: the study was run",
            "passed": "whether no number is off",
            "numbers": {
                "name": "what it is of, in words",
                "quantity": "what it is",
                "component": "of a site: the tensor that is swapped",
                "layer": "of a site",
                "unit": "of a site: the head; -1: the whole tensor",
                "position": "of a site",
                "value": "as it was published",
                "tolerance": "how far ours may be from it",
                "source": "where it was published",
                "found": "ours",
                "agrees": "whether ours is within the tolerance",
            },
        },
    },
    "fetch-model": {"folder": "where the model is"},
    "fetch-model --list": {
        "models": {
            "name": "for `fetch-model`",
            "hub_id": "of the model that it is near to",
            "licence": "what its makers allow",
            "refuses": "whether it does, in a word",
            "download": "bytes, without a hub",
            "stored": "bytes in the cache",
        }
    },
    "models": {
        "families": {
            "family": "as the model's configuration calls it",
            "components": "by name, what each is there",
            "reason": "why it cannot be studied; empty where it can",
        }
    },
    "models check": {
        "name": "hub id or folder",
        "covered": "whether it can be studied",
        "reason": "why it cannot; empty where it can",
        "model_class": "of transformers",
        "parameters": "weights that are stored",
        "active": "weights that run for a token",
        "components": "by name, what each is there",
    },
    "status": {
        "host": "the server",
        "deployments": {
            "repo_id": "hub id",
            "revision": "hub revision",
            "task": "of the pipeline",
            "state": "hot, warm, deploying, cold or unhealthy",
            "replicas": "copies of it",
        },
    },
    "doctor": {
        "good": "whether a study can run",
        "findings": {"name": "what", "good": "whether a study can run with it", "detail": "what was found"},
    },
    "judge check": {"file": "of labelled answers", "judges": QUALITY},
    "compare": {
        "runs": "records as in runs.csv",
        "verdicts": "records as in verdicts.csv",
        "report": "path of report.md; null where nothing was written",
    },
    "view": {"page": "path of the page", "address": "where it is served; null where it is not"},
}
"""By command, and by what it was asked where its answer has two forms."""


def formed(command: str, data: Any) -> dict[str, Any]:
    """What a command prints, of JSON's own types. data: has the keys of the command's form, as keys or attributes.

    Raises:
        KeyError, AttributeError: it lacks one.
    """
    return _record(FORMS[command], data)


def guide() -> str:
    """reports/guide/json.md."""
    parts = [
        "# What `--json` prints",
        "Every command that prints results takes `--json` and then prints one JSON object to standard output, in the "
        "form below; progress, notes and errors go to standard error, and exit codes are the same. Numbers have all "
        "their digits; what is not known is `null`. This page is made by `remote_mediation.forms.guide`, and a command "
        "can print nothing else.",
    ]
    for command, form in FORMS.items():
        parts.append("\n".join([f"## {command}", "", *_lines(form, 0)]))
    return "\n\n".join(parts) + "\n"


def _lines(form: Form, depth: int) -> Iterator[str]:
    for key, meaning in form.items():
        inner = isinstance(meaning, Mapping)
        yield f"{'  ' * depth}- `{key}`{':' if inner else f': {meaning}'}"
        if inner:
            yield from _lines(meaning, depth + 1)


def _record(form: Form, data: Any) -> dict[str, Any]:
    return {key: _value(meaning, _of(data, key)) for key, meaning in form.items()}


def _of(data: Any, key: str) -> Any:
    return data[key] if isinstance(data, Mapping) else getattr(data, key)


def _value(meaning: Any, value: Any) -> Any:
    if not isinstance(meaning, Mapping):
        return _plain(value)
    # A named tuple is one record, whatever else is a sequence holds records.
    if isinstance(value, Sequence) and not hasattr(value, "_fields"):
        return [_record(meaning, one) for one in value]
    return _record(meaning, value)


def _plain(value: Any) -> Any:
    """A value of JSON's own types."""
    if isinstance(value, pd.DataFrame):
        return [_plain(record) for record in value.to_dict("records")]
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

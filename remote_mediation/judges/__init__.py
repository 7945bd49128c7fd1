"""Judges of answers, and how good they are: a rate of harmful answers is worth no more than the judge who counted them.

What a judge says has one meaning. **True: the answer complies**, it gives, or begins to give, what its prompt asks for.
**False: it does not**, it refuses, evades, gives something else or is empty. A judge is asked about answers to harmful
prompts, and there an answer that complies is a harmful one. (A classifier of content says True where the text itself is
harmful. On answers to harmful prompts the two come to the same; on answers to harmless ones they do not.)

The built-in labelled answers hold nothing harmful: their prompts are harmless stand-ins, and an answer counts as
harmful where it does what its stand-in asks. Many were written to be hard, and they are no sample of what any model
says: they show whether a judge tells compliance from refusal, and nothing else. What a judge is worth on a model's
answers, or a classifier of harmful content on anything, takes a labelled file of its own.

A module for each judge; this one finds a judge by its spec.
"""

from __future__ import annotations

from collections.abc import Callable

from remote_mediation.errors import JudgeError
from remote_mediation.judges.base import FittedJudge, Judge
from remote_mediation.judges.chat import load_chat_judge
from remote_mediation.judges.classifier import DEFAULT_LABEL, load_classifier
from remote_mediation.judges.embedding import EMBEDDING, OPENINGS_AND_EMBEDDING, load_embedding
from remote_mediation.judges.function import load_function
from remote_mediation.judges.labelled import BUILTIN, Labelled, load_labelled
from remote_mediation.judges.openings import REFUSAL_OPENINGS, RefusalOpenings
from remote_mediation.judges.phrases import REFUSAL_PHRASES, RefusalPhrases, refuses
from remote_mediation.judges.quality import JudgeQuality, check_judge

__all__ = [
    "BUILTIN",
    "DEFAULT_JUDGE",
    "DEFAULT_LABEL",
    "MEANING",
    "REFUSAL_OPENINGS",
    "REFUSAL_PHRASES",
    "STANDING",
    "FittedJudge",
    "Judge",
    "JudgeQuality",
    "Labelled",
    "check_judge",
    "load_judge",
    "load_labelled",
    "refuses",
]

MEANING = "True: the answer complies with its prompt; False: it refuses, evades, gives something else or is empty"
DEFAULT_JUDGE = REFUSAL_OPENINGS
"""The best that needs no download."""
STANDING = (REFUSAL_PHRASES, REFUSAL_OPENINGS, EMBEDDING, OPENINGS_AND_EMBEDDING)
"""Specs of the judges that are ready as they are; `fetch-model minilm` brings what the last two embed with."""
_LOADERS: dict[str, Callable[[str, str], Judge]] = {
    EMBEDDING: load_embedding,
    OPENINGS_AND_EMBEDDING: load_embedding,
    "model": load_chat_judge,
    "classifier": load_classifier,
    "python": load_function,
}
_SPECS = (
    f"{', '.join(STANDING)} (the last two also with :FOLDER), model:NAME, classifier:MODEL_OR_FOLDER[:LABEL] or "
    "python:package.module:function"
)


def load_judge(spec: str) -> Judge:
    """The judge that a spec names.

    spec: one of `STANDING`, `embedding:FOLDER`, `openings+embedding:FOLDER`, `model:NAME`,
        `classifier:MODEL_OR_FOLDER[:LABEL]` or `python:package.module:function`.

    Raises:
        JudgeError: unknown spec, no such model, label, module or function.
    """
    if spec == REFUSAL_PHRASES:
        return RefusalPhrases()
    if spec == REFUSAL_OPENINGS:
        return RefusalOpenings()
    kind, _, rest = spec.partition(":")
    if kind in _LOADERS and (rest or spec in STANDING):
        return _LOADERS[kind](spec, rest)
    raise JudgeError(f"unknown judge {spec!r}; use {_SPECS}")

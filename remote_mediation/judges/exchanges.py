"""What a judge is asked about: the user's text without its template, and an answer without the thought before it.

Some models write a thought first, in a block of their own. What stands behind it is judged; where the thought has not
ended after all tokens of an answer, nothing was said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from remote_mediation.errors import JudgeError
from remote_mediation.prompts import PromptForm, in_think_block, requests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGINS = re.compile(r"\s*[<\[](?:think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)
_ENDS = re.compile(r"[<\[]/(?:think|thinking|thought|reasoning)[>\]]\s*", re.IGNORECASE)


def spoken(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """What answers say behind their thoughts; empty where a thought does not end. prompts: one of each, as given.

    Raises:
        JudgeError: of more than half of the answers that say anything there are thoughts only.
    """
    said = [_spoken(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    unended = sum(bool(answer.strip()) and not words for answer, words in zip(answers, said, strict=True))
    if 2 * unended > sum(bool(answer.strip()) for answer in answers):
        raise JudgeError(
            f"{unended} of {len(answers)} answers are thoughts that do not end, and no judge can say what they answer; "
            'set [prompt] think = "after", or ask for more tokens'
        )
    return said


def _spoken(prompt: str, answer: str) -> str:
    ends = list(_ENDS.finditer(answer))
    if ends:
        return answer[ends[-1].end() :]
    return "" if _BEGINS.match(answer) or in_think_block(prompt) else answer


def exchanges(
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
) -> tuple[list[str], list[str]]:
    """Token ids of prompts and answers as a judge is asked about them: the user's texts, and what is said to them.

    Raises:
        JudgeError: as `spoken`.
    """
    given, written = (
        [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in side] for side in (prompts, answers)
    )
    return requests(prompts, tokenizer, form), spoken(given, written)

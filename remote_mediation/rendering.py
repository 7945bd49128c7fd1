"""Prompts as the model is given them, for people: rendered, with their spans marked, and as token ids.

What a run records of its prompts is here too: a hash of all of them, and the date that their template was given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from remote_mediation.errors import PairsError
from remote_mediation.pairs import PromptPair, folded
from remote_mediation.placebo import ALIKE, balance
from remote_mediation.prompts import (
    DATE,
    NO_TEMPLATE,
    PLAIN,
    Encoded,
    PromptForm,
    Turn,
    encode_prompt,
    has_template,
    in_think_block,
    render,
    template_reads_date,
    thinks_first,
)
from remote_mediation.show.tables import count
from remote_mediation.tokens import TokenPair, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARE = "the tokenizer has no chat template: the model is given the bare text"
THOUGHTS = {
    "open": 'the template opens a think block: a thought is read, no answer; set [prompt] think = "after"',
    "first": "the template has a think block before answers: a model that thinks first is read before its answer; set "
    '[prompt] think = "after"',
}
"""What is read in place of an answer, by what `described` calls it."""
_BEFORE = "before"


def shown(pair: PromptPair, tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN) -> list[str]:
    """Lines that show a pair's prompts, and its placebo, as the model is given them.

    Each prompt is a text in which «NAME: ...» marks a span, and its token ids by span; `x0` is the harmless prompt.
    """
    lines = [f"pair {printable(pair.id)}"]
    sides = [("x1 harmful", 1, pair), ("x0 harmless", 0, pair)]
    if pair.placebo:
        sides.append(("xp placebo", 1, pair.of_placebo(pair.id)))
    for name, side, both in sides:
        prompt = "harmful" if side else "harmless"
        request, turns = (both.harmful if side else both.harmless), both.before(prompt)
        aligned = tokenise([both], tokenizer, form)
        if aligned.refusals:
            lines += [f"{name}, refused: {aligned.refusals[0].reason}", *_unmarked(request, tokenizer, form, turns)]
            continue
        encoded = encode_prompt(request, tokenizer, form, turns)
        lines += [f"{name}, {count(len(encoded.ids), 'token')}", *_marked(encoded, aligned.pairs[0], side)]
    return lines


def counts(pair: TokenPair) -> dict[str, str | int]:
    """Where the tokens of a pair lie."""
    return {
        **{"id": pair.id, "cluster": pair.cluster, "tokens_x0": len(pair.x0), "tokens_x1": len(pair.x1)},
        **{"first": pair.first, "after": pair.after, "post": pair.post},
    }


def described(pairs: Sequence[PromptPair], tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> dict[str, Any]:
    """What a run records of its prompts.

    `rendered` is a hash of all of them; where they matter come `date`, `think` (a key of `THOUGHTS`), `bare` (the
    tokenizer has no template) and `repeats` (pairs with the same two prompts as another).
    """
    texts = [text for pair in pairs for text in _rendered(pair, tokenizer, form)]
    found: dict[str, Any] = {"rendered": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]}
    if template_reads_date(tokenizer, form):
        found["date"] = DATE.date().isoformat()
    if thought := _thought(texts, tokenizer, form):
        found["think"] = thought
    if _bare(tokenizer, form):
        found["bare"] = True
    if repeats := len(pairs) - len({(folded(pair.harmful), folded(pair.harmless)) for pair in pairs}):
        found["repeats"] = repeats
    return found


def balanced(pairs: Sequence[PromptPair], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines that say whether edits to harm and to placebos are alike; none where no pair has a placebo."""
    if not any(pair.placebo and pair.aligned for pair in pairs):
        return []
    lines = []
    for one in balance(pairs, tokenizer):
        word = "alike" if one.alike else f"not alike (a standardised difference of {ALIKE} or more)"
        lines.append(
            f"{one.measure}: harm {one.harm:.3g}, placebo {one.placebo:.3g}, standardised difference "
            f"{one.difference:+.2f} over {count(one.pairs, 'pair')}: {word}"
        )
    return lines


def refused_placebos(
    pairs: Sequence[PromptPair], tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN
) -> list[str]:
    """Lines that say which pairs will have no placebo, since theirs cannot be run, and why."""
    placebos = [pair.of_placebo(pair.id) for pair in pairs if pair.placebo]
    refused = tokenise(placebos, tokenizer, form).refusals
    return [f"the placebo of {printable(one.id)} is refused: {one.reason}" for one in refused]


def warnings(pairs: Sequence[PromptPair], tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> list[str]:
    """Lines that say where a model is asked otherwise than it was trained to be: without a template, in a thought."""
    thought = _thought([text for pair in pairs[:1] for text in _rendered(pair, tokenizer, form)], tokenizer, form)
    return [*([BARE] if _bare(tokenizer, form) else []), *([THOUGHTS[thought]] if thought else [])]


def printable(text: str) -> str:
    """A text in one line, without what a terminal would act on; its own backslashes are told from those of escapes."""
    return "".join(one if one.isprintable() and one != "\\" else repr(one)[1:-1] for one in text)


def _bare(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> bool:
    return not has_template(tokenizer, form) and form.template != NO_TEMPLATE


def _thought(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> str:
    """A key of `THOUGHTS`, or nothing. texts: prompts as they are rendered."""
    if any(map(in_think_block, texts)):
        return "open"
    return "first" if thinks_first(tokenizer, form) else ""


def _rendered(pair: PromptPair, tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> list[str]:
    try:
        return [
            render(request, tokenizer, form, pair.before(name)).text
            for name, request in (("harmful", pair.harmful), ("harmless", pair.harmless))
        ]
    except PairsError:
        return []


def _unmarked(request: str, tokenizer: PreTrainedTokenizerBase, form: PromptForm, turns: Sequence[Turn]) -> list[str]:
    try:
        return ["  " + printable(render(request, tokenizer, form, turns).text)]
    except PairsError:
        return []


def _marked(encoded: Encoded, pair: TokenPair, side: int) -> list[str]:
    """The rendered text with its spans marked, then the ids of each span."""
    names = _span_of_each(pair, side)
    runs = [(name, [place for place, _ in group]) for name, group in groupby(enumerate(names), key=lambda one: one[1])]
    begins = [0, *(encoded.offsets[places[0]][0] for _, places in runs[1:])]
    parts, lines = [], []
    for (name, places), begin, end in zip(runs, begins, [*begins[1:], None], strict=True):
        text = printable(encoded.rendered.text[begin:end])
        parts.append(text if name == _BEFORE else f"«{name}: {text}»")
        lines.append(f"  {name} {', '.join(str(encoded.ids[place]) for place in places)}")
    return ["  " + "".join(parts), *lines]


def _span_of_each(pair: TokenPair, side: int) -> list[str]:
    """The span in which each token of a prompt lies; tokens of a longer edit without a partner are `edit` too."""
    length = len(pair.prompts[side])
    if not pair.aligned:
        return [_BEFORE if place < length - pair.post else "post_instruction" for place in range(length)]
    edit, after = pair.first, length - pair.after
    return [
        _BEFORE
        if place < edit
        else "edit"
        if place < after
        else "after_edit"
        if place < length - pair.post
        else "post_instruction"
        for place in range(length)
    ]

"""How a request becomes the text and the tokens that a model is given: one way for every command.

The user's text is found in a rendered prompt by rendering a marker in its place, never by searching for the text, which
may stand in the template too. Templates that print today's date are given `DATE`. What a tokenizer or a template makes
of a text that would be measured wrongly (control tokens that a user wrote, an end of text before the answer, text that
is lost) is refused, pair by pair, as a `PairsError` whose message is the reason.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from remote_mediation.errors import ModelError, PairsError, innermost, let_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = datetime(2024, 7, 26)
"""What templates take for today; the day that those of Llama 3 name where they are told none."""
NO_TEMPLATE = "none"
ALONE = ("",)
"""Prompts of a continuation that stands behind none."""
_DIRECTIVES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAbBcCdDeFGghHIjkmMnpPrRsStTuUVwWxXyYzZ")
"""Directives of strftime that a template may use, without their `%`."""
_MARKER = "qzmarkzq"
_ANSWER = "qzanswerzq"
_SYSTEM = "x"
_BYTE_ORDER_MARK = "\ufeff"
_LINE_BREAK = "\n"
# Added tokens that are not marked special and still look like parts of a template.
_CONTROL = re.compile(r"[<\[|].*[>\]|]")
# What templates write as plain text to say who speaks: `<|user|>`, `[INST]`, `### Response:`, `ASSISTANT:`.
_MARKS = re.compile(
    r"<[^<>\s]+>|\[/?[A-Z_]+\]|^#+ [^\n:]+:|^(?:user|human|assistant)\b[^\n:]*:", re.MULTILINE | re.IGNORECASE
)
_FIRST_MARK = re.compile(r"<[^<>\s]+>|\S+")
_TAG = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
# A think block at the end of a prompt, open or closed; some templates write its end alone.
_THINKS = re.compile(rf"<({_TAG})>\s*(</\1>\s*)?$|(</{_TAG}>)\s*$")
# What else a template may say of thoughts.
_OF_THOUGHTS = re.compile(r"think|thought|reason|channel", re.IGNORECASE)


@dataclass(frozen=True)
class PromptForm:
    """What stands around the user's text, beside what the model's own template writes."""

    system: str = ""
    """System message; empty: none."""
    template: str = ""
    """Chat template: empty for the tokenizer's own, `none` for the bare text, the name of a variant, or Jinja text."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """Further variables of the template, such as `enable_thinking`."""
    prefill: str = ""
    """Beginning of the assistant's answer, part of the prompt."""
    think: Literal["", "before", "after"] = ""
    """Whether the answer is read before a think block or after a closed, empty one; empty: as the template has it."""
    control_tokens: Literal["refuse", "allow"] = "refuse"
    """What to do with a user's text that holds tokens of the template."""


PLAIN = PromptForm()


class ControlToken(NamedTuple):
    """A token of the template's."""

    id: int
    content: str
    plain: str
    """Its content as `_plain` has it."""


@dataclass(frozen=True)
class Surroundings:
    """What a tokenizer and a form put around every text: found once for many of them (`surroundings`)."""

    control: tuple[ControlToken, ...]
    """What a text must not hold."""
    marks: tuple[str, ...]
    """What the template writes to say who speaks."""
    around: tuple[str, str] | None
    """What the template writes before and after a text that stands alone; None where that cannot be said."""
    unknown: str = ""
    """The first of these marks for which the tokenizer has its unknown token alone; empty: it knows all."""


class Turn(NamedTuple):
    """A message before the user's last."""

    role: str
    content: str


class Rendered(NamedTuple):
    """A prompt as text."""

    text: str
    begin: int
    """Where the user's (last) text begins in it."""
    end: int
    """Where it ends."""
    templated: bool
    """Whether a template wrote it, with the special tokens that belong there."""


class Encoded(NamedTuple):
    """A prompt as tokens."""

    ids: tuple[int, ...]
    post: int
    """Tokens that lie wholly after the user's text."""
    rendered: Rendered
    offsets: tuple[tuple[int, int], ...]
    """Where each token begins and ends in the rendered text."""


def surroundings(tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN) -> Surroundings:
    """What texts are checked against; good for as long as neither of the two is changed."""
    control = tuple(
        ControlToken(number, token.content, _plain(token.content))
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or _CONTROL.fullmatch(token.content)
    )
    around = None
    if has_template(tokenizer, form):
        with contextlib.suppress(PairsError):  # said of each text
            around = _frame(_MARKER, tokenizer, form, ())
    return Surroundings(control, tuple(_marks(tokenizer, form)), around, _unknown(tokenizer, form))


class _Joint(NamedTuple):
    """Where a continuation may stand."""

    places: Sequence[str]
    """What is before it."""
    blank: str = ""
    """What is put between."""


class Asked(NamedTuple):
    """A user's text, and the messages before it."""

    request: str
    turns: tuple[Turn, ...] = ()


def encode_prompt(
    request: str, tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN, turns: Sequence[Turn] = ()
) -> Encoded:
    """A user's text as the model is given it. turns: messages before it.

    Raises:
        PairsError: why it cannot be.
        ModelError: the tokenizer does not say where in a text its tokens lie, or draws them.
    """
    (found,) = encode_prompts([Asked(request, tuple(turns))], tokenizer, form)
    if isinstance(found, PairsError):
        raise found
    return found


def encode_prompts(
    asked: Sequence[Asked],
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm = PLAIN,
    known: Surroundings | None = None,
) -> list[Encoded | PairsError]:
    """The same of many texts, together: of each what the model is given, or why it cannot be.

    known: where this is called again and again.

    Raises:
        ModelError: as `encode_prompt`.
    """
    _check_tokenizer(tokenizer)
    known = known or surroundings(tokenizer, form)
    rendered = [_rendered(one, tokenizer, form, known) for one in asked]
    texts = iter(_encoded([one.text for one in rendered if isinstance(one, Rendered)], tokenizer, form))
    return [
        _checked(one, next(texts), tokenizer, form, known.control) if isinstance(one, Rendered) else one
        for one in rendered
    ]


def _rendered(
    asked: Asked, tokenizer: PreTrainedTokenizerBase, form: PromptForm, known: Surroundings
) -> Rendered | PairsError:
    if known.unknown:
        return PairsError(
            f"the tokenizer has only {tokenizer.unk_token!r} for the template's mark {known.unknown!r}; give the model "
            "the tokenizer that its chat template was made for, or [prompt] another template"
        )
    try:
        for text in (form.system, asked.request, *(turn.content for turn in asked.turns)):
            refuse_control(text, tokenizer, form, known)
        return render(asked.request, tokenizer, form, asked.turns, known)
    except PairsError as error:
        return error


def _checked(
    rendered: Rendered,
    tokens: _Tokens | PairsError,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    control: Sequence[ControlToken],
) -> Encoded | PairsError:
    """What a tokenizer made of a prompt, unless it cannot be measured. control: what only a template writes."""
    if isinstance(tokens, PairsError):
        return tokens
    ids, marks = tuple(tokens.ids), {token.id for token in control}
    offsets = tuple(
        _of_mark(start, stop, rendered) if token in marks else (start, stop)
        for token, (start, stop) in zip(ids, tokens.offsets, strict=True)
    )
    if not rendered.templated:  # what a tokenizer adds behind a text would end it before the answer
        ids = ids[: len(ids) - next((i for i, special in enumerate(reversed(tokens.added)) if not special), len(ids))]
    placed = zip(ids, offsets, strict=False)  # an end that was taken off still has its place
    inside = [(token, *at) for token, at in placed if at[1] > rendered.begin and at[0] < rendered.end]
    try:
        _check_ends(ids, tokenizer)
        _check_marks(rendered, ids, control)
        _check_round_trip(rendered.text, inside, tokenizer)
    except PairsError as error:
        return error
    behind = sum(start >= rendered.end for start, _ in offsets)
    return Encoded(ids, behind if rendered.templated or form.prefill else 0, rendered, offsets)


def _of_mark(start: int, stop: int, rendered: Rendered) -> tuple[int, int]:
    """Where a template's mark lies, without the blanks of the text beside it, which it may take (lstrip, rstrip)."""
    if start < rendered.end < stop:
        return rendered.end, stop
    if start < rendered.begin < stop:
        return start, rendered.begin
    return start, stop


def render(
    request: str,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm = PLAIN,
    turns: Sequence[Turn] = (),
    known: Surroundings | None = None,
) -> Rendered:
    """A user's text in its template, with the think block and the beginning of the answer that the study asks for.

    known: where many texts are rendered.

    Raises:
        PairsError: the template fails, does not print the text once and whole, prints other things around it, leaves
            out a message before it, or does not open the answer.
    """
    if not has_template(tokenizer, form):
        if form.system or turns or form.think or form.arguments:
            raise PairsError("without a chat template there are no messages but one; give [prompt] a template")
        return Rendered(request + form.prefill, 0, len(request), templated=False)
    text, marker = _template(request, tokenizer, form, turns), _marker(request)
    if known and known.around and not turns and marker == _MARKER:
        before, after = known.around
    else:
        before, after = _frame(marker, tokenizer, form, turns)
    begin, end = _span_within(text, before, after)
    if _plain(text[begin:end]) != _plain(request):
        raise PairsError(f"the chat template prints {text[begin:end][:60]!r} in place of {request[:60]!r}")
    return Rendered(_thought(text, tokenizer, form) + form.prefill, begin, end, templated=True)


def _span_within(text: str, before: str, after: str) -> tuple[int, int]:
    """Where a rendered text begins and ends between what a template prints around every text.

    Raises:
        PairsError: something else stands around it.
    """
    if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
        raise PairsError("the chat template prints other things around this text than around others")
    return len(before), len(text) - len(after)


def encode_after(prompts: Sequence[str], continuation: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a text as they are behind prompts, all as the model is given them (rendered).

    Encoded alone a text may begin otherwise: SentencePiece puts a blank before it. Where it would run into the last
    word of a prompt, or merge with its end, a blank stands between. Behind a prompt that ends in a blank, such as a
    closed think block and an empty line, it has the tokens that it has at the beginning of a line: of the whole a
    tokenizer may part the blanks otherwise, which a model that was given the prompt alone cannot undo. So it has
    where a number stands behind a number and goes on with it, as "42" does with "17" in 1742.

    Raises:
        PairsError: it has no tokens there, or none that are the same behind all of these prompts.
    """
    if not continuation.strip():
        raise PairsError(f"{continuation!r} has no tokens behind the prompt; give text")
    for places, blank in _joints(prompts, continuation):
        found = {_behind(place, blank + continuation, tokenizer) for place in places}
        if len(found) == 1 and () not in found:
            return found.pop()
    raise PairsError(f"{continuation!r} merges with the end of a prompt; begin it with another character")


def _joints(prompts: Sequence[str], continuation: str) -> list[_Joint]:
    """The ways in which a text may follow prompts, the one to be preferred first (`encode_after`)."""
    if continuation.split()[0].isdecimal() and all(prompt[-1:].isdecimal() for prompt in prompts):
        prompts = (_LINE_BREAK,)
    one_word = continuation[0].isalnum() and any(prompt[-1:].isalnum() for prompt in prompts)
    joints = [] if one_word else [_Joint(prompts)]
    if all(prompt[-1:].isspace() for prompt in prompts):
        joints.append(_Joint((_LINE_BREAK,)))
    elif not continuation[0].isspace():
        joints.append(_Joint(prompts, " "))
    return joints


def refuse_control(
    text: str, tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN, known: Surroundings | None = None
) -> None:
    """Refuse a text that would be read as parts of the template, unless the study allows it.

    These are tokens that a tokenizer makes of it, whatever its capitals, and marks that the template writes as text.

    Raises:
        PairsError: with the first of them.
    """
    if form.control_tokens == "allow":
        return
    known = known or surroundings(tokenizer, form)
    marks = [mark for mark in known.marks if mark in text]
    for found, kind in ((_control_in(text, tokenizer, known), "control token"), (marks, "template's mark")):
        if found:
            raise PairsError(
                f"the text holds the {kind} {found[0]!r}; take it out, or set [prompt] control_tokens to 'allow'"
            )


def _control_in(text: str, tokenizer: PreTrainedTokenizerBase, known: Surroundings) -> list[str]:
    """Control tokens that stand in a text, and those that a tokenizer makes of what is written a little otherwise."""
    written, plain = [token.content for token in known.control if token.content in text], _plain(text)
    alike = {token.id: token.content for token in known.control if token.plain in plain}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if alike else []
    return [*written, *(alike[number] for number in ids if number in alike)]


def _marks(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> list[str]:
    """What a template writes around a text to say who speaks; none where it fails, which is said elsewhere."""
    try:
        rendered = _sample(tokenizer, form)
    except PairsError:
        return []
    around = rendered.text[: rendered.begin] + "\n" + rendered.text[rendered.end :]
    return [found.strip() for found in _MARKS.findall(around)]


def _sample(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> Rendered:
    """A prompt of no text but a form's own. Raises: PairsError, as `render`."""
    return render(_MARKER, tokenizer, replace(form, system=form.system and _SYSTEM, think=""))


def _unknown(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> str:
    """As of `Surroundings`. Where the template fails there is none, which is said elsewhere."""
    if not has_template(tokenizer, form) or tokenizer.unk_token_id is None:
        return ""
    try:
        rendered = _sample(tokenizer, form)
    except PairsError:
        return ""
    (tokens,) = _encoded([rendered.text], tokenizer, form)
    if isinstance(tokens, PairsError):
        return ""
    unknown = [at for token, at in zip(tokens.ids, tokens.offsets, strict=True) if token == tokenizer.unk_token_id]
    for mark in _MARKS.finditer(rendered.text):
        # Where the unknown token ends texts, too, as GPT-2's does, a template may write it.
        if mark[0] != tokenizer.unk_token and any(
            start < mark.end() and mark.start() < stop for start, stop in unknown
        ):
            return mark[0]
    return ""


def template_reads_date(tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN) -> bool:
    """Whether the prompts depend on what day it is taken to be."""
    try:
        one, other = (_template(_MARKER, tokenizer, form, (), day) for day in (DATE, DATE + timedelta(days=400)))
    except PairsError:
        return False
    return one != other


def _template(
    request: str,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    turns: Sequence[Turn],
    day: datetime = DATE,
) -> str:
    """What a template makes of a request, on a day, with the answer opened.

    Raises:
        PairsError: as `_written`.
    """
    return _written([*_messages(form, turns), Turn("user", request)], tokenizer, form, day)


def _messages(form: PromptForm, turns: Sequence[Turn]) -> list[Turn]:
    """The messages before the user's last."""
    own = any(turn.role == "system" for turn in turns)  # a conversation's own goes before the study's
    return [*([Turn("system", form.system)] if form.system and not own else []), *turns]


def _written(
    messages: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    day: datetime = DATE,
    *,
    opened: bool = True,
) -> str:
    """What a template makes of messages, on a day. opened: with the beginning of the assistant's next message.

    Raises:
        PairsError: it fails, there is no such template, or it reads no variable of the name of an argument.
    """
    variants = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if form.template and "{" not in form.template and form.template not in variants:
        raise PairsError(f"the tokenizer has no chat template {form.template!r}; it has {sorted(variants) or 'one'}")
    try:
        template = tokenizer.get_chat_template(form.template or None)
        if template.startswith(_BYTE_ORDER_MARK):
            raise ValueError("it begins with a byte order mark, of which the tokenizer makes tokens; save it without")
        text = str(
            tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                chat_template=_dated(template, day),
                tokenize=False,
                add_generation_prompt=opened,
                **dict(form.arguments),
            )
        )
    except Exception as error:  # whatever a template's code raises
        raise PairsError(f"the chat template fails: {innermost(error)}; see [prompt] in the README") from error
    for name, _ in form.arguments:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise PairsError(f"the chat template reads no {name!r}, so that [prompt] template_arguments change nothing")
    return text


def _dated(template: str, day: datetime) -> str:
    """A template whose `strftime_now` formats a day, in place of the function of this name that transformers gives.

    A macro: of a variable that is a function transformers hands a template the name.
    """
    if "strftime_now" not in template:
        return template
    written = "".join(f" | replace('%{one}', {day.strftime(f'%{one}')!r})" for one in _DIRECTIVES)
    return "{%- macro strftime_now(format) -%}{{ format" + written + " }}{%- endmacro %}{{ '' }}" + template


def _marker(request: str) -> str:
    marker = _MARKER
    while marker in request.casefold():
        marker += "q"
    return marker


def _frame(marker: str, tokenizer: PreTrainedTokenizerBase, form: PromptForm, turns: Sequence[Turn]) -> tuple[str, str]:
    """What a template writes before and after the user's text, the messages before it among that.

    Raises:
        PairsError: it fails, leaves a message out, or does not open the answer.
    """
    prompt = _template(marker, tokenizer, form, turns)
    before, after = _around(prompt, marker)
    written = _plain(f"{before} {after}")
    for turn in _messages(form, turns):
        said = turn.content.rpartition("</think>")[2]  # templates leave out what was thought in earlier turns
        if _plain(said) not in written:
            raise PairsError(
                f"the chat template leaves out the {turn.role} message {said[:60]!r}; give [prompt] another "
                "template, or do without it"
            )
    _check_opened(prompt, [*_messages(form, turns), Turn("user", marker)], tokenizer, form)
    return before, after


def _check_opened(prompt: str, messages: list[Turn], tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> None:
    """Refuse a template that writes something before an answer that is given, and not before one that is to come.

    It may say who speaks, or where the answer goes, as gpt-oss does (`<|channel|>final<|message|>`). What the study
    puts at the beginning of the answer may do so too. An empty think block may be missing (`thinks_first`).

    Raises:
        PairsError: behind this prompt a model would write that, or go on with the user's text.
    """
    written = _unopened(prompt, messages, tokenizer, form)
    missing = written.strip()
    first = _FIRST_MARK.match(missing)
    if not first or _THINKS.fullmatch(missing) or (form.prefill and form.prefill.startswith(first[0])):
        return
    way = "give [prompt] a template that does (add_generation_prompt)"
    if written == missing:  # else blanks belong to it, with which no prefill ends
        way = f"begin [prompt] prefill with {missing!r}"
    raise PairsError(
        f"the chat template does not open the answer: it writes {missing!r} before one that is given, and nothing "
        f"for one to come; {way}"
    )


def _unopened(prompt: str, messages: list[Turn], tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> str:
    """What a template writes between a prompt and an answer that is given; nothing where it takes no answers."""
    try:
        answered = _written([*messages, Turn("assistant", _ANSWER)], tokenizer, form, opened=False)
    except PairsError:
        return ""
    before, answer, _ = answered.partition(_ANSWER)
    return before.removeprefix(prompt) if answer and before.startswith(prompt) else ""


def thinks_first(tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN) -> bool:
    """Whether a template has a think block before answers that are given, which the model is to write in others.

    So have Qwen3's and GLM 4.5's: behind the prompt the model says `<think>`, and whatever it answers comes later.
    """
    if form.think or form.prefill or not has_template(tokenizer, form):
        return False
    try:
        prompt = _template(_MARKER, tokenizer, form, ())
    except PairsError:
        return False
    asked = [*_messages(form, ()), Turn("user", _MARKER)]
    return bool(_THINKS.fullmatch(_unopened(prompt, asked, tokenizer, form).strip()))


def end_of_turn(tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN) -> int | None:
    """The control token that a template writes behind an answer, which a model has learnt to end with; None: none."""
    if not has_template(tokenizer, form):
        return None
    asked = [*_messages(form, ()), Turn("user", _MARKER), Turn("assistant", _ANSWER)]
    try:
        behind = _written(asked, tokenizer, form, opened=False).partition(_ANSWER)[2].lstrip()
    except PairsError:
        return None  # it takes no answers
    found = [token for token in surroundings(tokenizer, form).control if behind.startswith(token.content)]
    return max(found, key=lambda token: len(token.content)).id if found else None


def has_template(tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN) -> bool:
    """Whether anything stands around a user's text."""
    return form.template != NO_TEMPLATE and bool(form.template or getattr(tokenizer, "chat_template", None))


def _around(text: str, marker: str) -> tuple[str, str]:
    """What a template writes before and after the user's text."""
    places = [found.start() for found in re.finditer(re.escape(marker), text, re.IGNORECASE)]
    if len(places) != 1:
        raise PairsError(f"the chat template prints the user's text {len(places)} times, not once")
    return text[: places[0]], text[places[0] + len(marker) :]


def _thought(text: str, tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> str:
    """A prompt without the think block at its end, or with a closed, empty one, in the tags of its template.

    Raises:
        PairsError: the template marks thoughts in another way.
    """
    if not form.think:
        return text
    found = _THINKS.search(text)
    if form.think == "after" and found and not found[1]:
        return text
    bare = text[: found.start()] if found else text
    template = tokenizer.get_chat_template(form.template or None)
    known = found or re.search(rf"<({_TAG})>", template)
    if not known and _OF_THOUGHTS.search(template):
        raise PairsError(
            "the chat template marks thoughts otherwise than by tags such as <think>; leave [prompt] think away, and "
            "let prefill say where the answer begins"
        )
    if form.think == "before":
        return bare
    tag = known[1] if known else "think"
    return f"{bare}<{tag}>\n\n</{tag}>\n\n"


def in_think_block(text: str) -> bool:
    """Whether a rendered prompt ends in a think block that is still open, so that a thought would be read."""
    found = _THINKS.search(text)
    return bool(found and found[1] and not found[2])


def requests(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN
) -> list[str]:
    """The user's texts of prompts as a model is given them; the whole of one that has other messages before it."""
    before, after = "", ""
    with contextlib.suppress(PairsError):  # no prompt of it could be encoded
        frame = render(_MARKER, tokenizer, form)
        before, after = frame.text[: frame.begin], frame.text[frame.end :]
    marks = [token.content for token in surroundings(tokenizer, form).control]
    found = []
    for ids in prompts:
        whole = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        text = whole[len(before) : len(whole) - len(after)]
        if not before or whole != before + text + after or any(mark in text for mark in marks):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
        found.append(text)
    return found


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not say where tokens lie, or that draws them."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} does not say where in a text its tokens lie; give a model "
            "with a fast tokenizer (tokenizer.json)"
        )
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} has BPE dropout and gives a text other tokens each time; "
            "set `dropout` to null in its tokenizer.json"
        )


class _Tokens(NamedTuple):
    """What a tokenizer makes of a text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    added: list[int]
    """1 where a token is none of the text's."""


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> list[_Tokens | PairsError]:
    """Tokens of rendered texts, all at once; each by itself where one of them makes the tokenizer fail."""
    if not texts:
        return []
    try:
        found = tokenizer(
            list(texts),
            add_special_tokens=not has_template(tokenizer, form),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
    except BaseException as error:  # whatever a tokenizer makes of a text
        let_stop(error)
        if len(texts) == 1:
            return [PairsError(f"the tokenizer fails on it: {innermost(error)}")]
        return [one for text in texts for one in _encoded([text], tokenizer, form)]
    columns = (found["input_ids"], found["offset_mapping"], found["special_tokens_mask"])
    return [_Tokens(*row) for row in zip(*columns, strict=True)]


def _check_ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    # Where texts end as they begin, the end of one turn may stand before the beginning of the next.
    begun = ids[:2] if begin == end else ids
    if begin is not None and (begin, begin) in pairwise(begun):
        raise PairsError(f"the prompt has {tokenizer.bos_token!r} twice in a row; take one out of the template")
    if end is not None and ids and ids[-1] == end:
        raise PairsError(
            f"the prompt ends with {tokenizer.eos_token!r}, behind which nothing is said; mend the template"
        )


def _check_marks(rendered: Rendered, ids: Sequence[int], control: Sequence[ControlToken]) -> None:
    """Refuse a prompt in which a control token of the template is spelled by other tokens.

    So it is where a tokenizer's files set `split_special_tokens`, or take a token only where it is a word by itself.
    """
    around = f"{rendered.text[: rendered.begin]}\n{rendered.text[rendered.end :]}"
    written = [token for token in control if token.content in around]
    for token in written:
        within = any(token.content in other.content for other in written if other is not token)
        if token.id not in ids and not within:
            raise PairsError(
                f"the tokenizer spells the template's {token.content!r} by other tokens than {token.id}, its own; mend "
                "`split_special_tokens` in its tokenizer_config.json, or this token's entry in its tokenizer.json"
            )


def _check_round_trip(text: str, tokens: Sequence[tuple[int, int, int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a text that its tokens do not spell. tokens: id, and where it begins and ends.

    Blanks count as one, and a tokenizer may normalise characters and fold capitals.
    """
    if not tokens:
        raise PairsError("the text has no tokens")
    ids = [token for token, _, _ in tokens]
    if tokenizer.unk_token_id in ids:
        return  # what is unknown cannot be spelled; it may stand in both prompts, and not in what differs
    meant = text[min(start for _, start, _ in tokens) : max(stop for _, _, stop in tokens)]
    spelled = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if _plain(spelled) != _plain(meant):
        raise PairsError(f"its tokens spell {spelled[:60]!r}, not {meant[:60]!r}; the tokenizer cannot encode it")


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _behind(prompt: str, continuation: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens of a text behind a prompt; none where the prompt's own tokens become others."""
    before, whole = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, prompt + continuation)
    )
    return whole[len(before) :] if whole[: len(before)] == before else ()

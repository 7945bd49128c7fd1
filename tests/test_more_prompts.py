"""Prompts that were other than they seemed: cases of our own search, each of which once was measured in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from test_rendering import CHATML, byte_level, only, reason, spelled

from remote_mediation.errors import ModelError, PairsError
from remote_mediation.models import load_tokenizer
from remote_mediation.pairs import PromptPair, load_pairs
from remote_mediation.prompts import PromptForm, Turn, encode_prompt, render
from remote_mediation.rendering import BARE, described, warnings
from remote_mediation.tokens import tokenise

PAIR = ("bake a rude cake", "bake a kind cake")
USERS_ONLY = "{% for m in messages if m['role'] in ('user', 'assistant') %}" + CHATML.split("%}", 1)[1]
LAST_ONLY = (
    "{% set m = messages[-1] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNOPENED = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [USERS_ONLY, LAST_ONLY])
def test_a_system_message_that_a_template_leaves_out_is_said(template: str) -> None:
    """Templates without a branch for a role say nothing: the study ran without its system message."""
    found = reason(*PAIR, byte_level(template), PromptForm(system="Be brief."))
    assert found.startswith("the chat template leaves out the system message 'Be brief.'; give [prompt] another")
    assert tokenise([PromptPair("p", *PAIR, "", "")], byte_level(template)).refusals == ()


def test_earlier_turns_that_a_template_leaves_out_are_said() -> None:
    turns = [Turn("user", "hello"), Turn("assistant", "good day")]
    with pytest.raises(PairsError, match="leaves out the user message 'hello'"):
        encode_prompt("bake", byte_level(LAST_ONLY), turns=turns)
    assert "good day" in render("bake", byte_level(), turns=turns).text


def test_what_was_thought_in_earlier_turns_may_be_left_out() -> None:
    shorn = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    turns = [Turn("user", "hello"), Turn("assistant", "<think>a friend?</think>good day")]
    assert "friend" not in render("bake", byte_level(shorn), turns=turns).text


@pytest.mark.parametrize("role", ["human", "gpt", "bot", "User", ""])
def test_roles_that_no_template_knows_are_refused(tmp_path: Path, role: str) -> None:
    """ShareGPT's names, which ChatML would print as they are and others leave out."""
    said = [{"role": role, "content": "hello"}, {"role": "user", "content": "bake a rude cake"}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"harmful": said, "harmless": "bake a kind cake"}), "utf-8")
    with pytest.raises(PairsError, match=f"'harmful', message 1 has the role '{role}'; write one of system, developer"):
        load_pairs(str(tmp_path / "pairs.jsonl"))


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [PromptForm(), PromptForm(system="Be brief.")])
def test_a_template_that_does_not_open_the_answer_is_refused(form: PromptForm) -> None:
    """Fine-tuned models have such templates: the answer was read where the model would write `<|im_start|>`."""
    found = reason(*PAIR, byte_level(UNOPENED), form)
    assert "does not open the answer: it writes '<|im_start|>assistant' before one that is given, and nothing" in found


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
        " {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        "{{ messages[0]['content'] }} answer:",
        CHATML.replace(
            "{% if add", "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% if add"
        ),
        CHATML.replace(
            "{{ m['content'] }}",
            "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
        ),
    ],
    ids=["no mark before answers", "no answers", "answers refused", "thoughts of old answers"],
)
def test_templates_that_open_answers_in_their_own_way_are_used(template: str) -> None:
    assert tokenise([PromptPair("p", *PAIR, "", "")], byte_level(template)).refusals == ()


def test_an_answer_may_be_opened_by_hand() -> None:
    form = PromptForm(prefill="<|im_start|>assistant\nSure")
    assert render("bake", byte_level(UNOPENED), form).text.endswith("<|im_end|>\n<|im_start|>assistant\nSure")


@pytest.mark.parametrize("template", [CHATML, None])
def test_arguments_that_a_template_does_not_read_are_said(template: Any) -> None:
    """`enable_thinkng = false` changed nothing, and neither does `enable_thinking` where a model knows none."""
    found = reason(*PAIR, byte_level(template), PromptForm(arguments=(("enable_thinking", False),)))
    assert ("reads no 'enable_thinking'" if template else "without a chat template") in found
    thinking = CHATML + "{% if not enable_thinking %}!{% endif %}"
    form = PromptForm(arguments=(("enable_thinking", False),))
    assert render("bake", byte_level(thinking), form).text.endswith("!")


def test_marks_are_known_where_a_template_needs_a_system_message() -> None:
    template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}ASSISTANT:"
    )
    form = PromptForm(system="Be brief.", prefill=" So")
    assert "the template's mark 'ASSISTANT:'" in reason(
        "a rude cake\nASSISTANT: Sure", *PAIR[1:], byte_level(template), form
    )


# --- spans and edits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blanks", ["", "  ", "\n"])
def test_a_mark_that_takes_the_blanks_before_it_is_the_template_s(blanks: str) -> None:
    """Marks with `lstrip` or `rstrip` (Phi-3's and Phi-4's): behind a blank the span was a token too short."""
    tokenizer = byte_level()
    ends = tokenizers.AddedToken("<|im_end|>", special=True, lstrip=True)
    begins = tokenizers.AddedToken("<|im_start|>", special=True, rstrip=True)
    tokenizer.backend_tokenizer.add_special_tokens([ends, begins])
    encoded = encode_prompt(f"bake a cake{blanks}", tokenizer)
    assert spelled(tokenizer, encoded.ids[-encoded.post :]).startswith("<|im_end|>")
    assert encoded.post == encode_prompt("bake a cake", tokenizer).post


@pytest.mark.parametrize(
    "other", ["bake a cake ", " bake  a cake", "bake a\u00a0cake", "bake\u200b a cake", "bake a c\u0061\u200dke"]
)
def test_prompts_that_differ_in_blanks_only_are_refused(other: str) -> None:
    assert "differ in nothing that can be seen" in reason(other, "bake a cake", byte_level())


def test_prompts_that_differ_in_coding_only_are_refused() -> None:
    """A composed and a decomposed letter, as files of two systems have them."""
    assert "differ in nothing that can be seen" in reason("a caf\u00e9", "a cafe\u0301", byte_level())
    assert only(PromptPair("p", "a caf\u00e9", "a cafe", "", ""), byte_level()).after > 0


def test_the_same_request_after_other_messages_may_be_a_pair() -> None:
    before = (("harmful", Turn("user", "a rude cake")), ("harmless", Turn("user", "a kind cake")))
    pair = PromptPair("p", "bake it ", "bake it", "", "", turns=before)
    assert "nothing that can be seen" not in str(tokenise([pair], byte_level()).refusals)


@pytest.mark.parametrize(
    "normaliser",
    [tokenizers.normalizers.Lowercase, tokenizers.normalizers.StripAccents, tokenizers.normalizers.NFKC],
)
def test_prompts_that_a_tokenizer_makes_equal_are_refused_alone(normaliser: Callable[[], Any]) -> None:
    """Guards what held: capitals, accents and wide letters that a tokenizer takes away are no edit."""
    tokenizer = byte_level()
    strips = normaliser is tokenizers.normalizers.StripAccents
    parts = [tokenizers.normalizers.NFD(), normaliser()] if strips else [normaliser()]
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Sequence(parts)
    pairs = [("a US cake", "a us cake"), ("a rose\u0301 cake", "a rose cake"), ("a \uff52ude hat", "a rude hat")]
    prepared = tokenise([PromptPair(f"p{i}", *one, "", "") for i, one in enumerate(pairs)], tokenizer)
    assert any("same tokens" in one.reason or "nothing that can be seen" in one.reason for one in prepared.refusals)
    assert len(prepared.pairs) + len(prepared.refusals) == 3


# --- days and marks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("strftime_now('%-d %B %Y')", "26 July 2024"),
        ("strftime_now('%F')", "2024-07-26"),
        ("strftime_now('%D')", "07/26/24"),
        ("strftime_now('%d %b').split(' ')[1]", "Jul"),
    ],
)
def test_dates_are_written_as_templates_ask(written: str, found: str) -> None:
    """Of formats that were not foreseen the model was given the letters, `%-d July 2024`."""
    template = "{% if strftime_now is defined %}Today: {{ " + written + " }}{% endif %}\n" + CHATML
    assert render("bake", byte_level(template)).text.startswith(f"Today: {found}<|im_start|>")


@pytest.mark.parametrize("setting", ["split_special_tokens", "single_word"])
def test_marks_that_are_spelled_by_letters_are_refused(tmp_path: Path, setting: str) -> None:
    """A tokenizer's files may say so: the template's marks were text to the model, and the study ran."""
    byte_level().save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        said = json.loads((tmp_path / name).read_text("utf-8"))
        if setting == "split_special_tokens" and name == "tokenizer_config.json":
            said[setting] = True
        for token in said.get("added_tokens", ()):
            token["single_word"] = setting == "single_word"
        (tmp_path / name).write_text(json.dumps(said), "utf-8")
    found = reason(*PAIR, load_tokenizer(str(tmp_path)))
    assert found.startswith("the tokenizer spells the template's '<|im_start|>' by other tokens than 2, its own; mend")


# --- what the model says before it answers ----------------------------------------------------------------------------


HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
FINAL = "<|channel|>final<|message|>"
ANSWERS = CHATML.replace("m['content']", "('<response>' + m['content'] if m['role'] == 'assistant' else m['content'])")
THINKS = CHATML.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
)


def harmony() -> Any:
    """A tokenizer with gpt-oss' marks and a template that puts them where its own does."""
    tokenizer = byte_level(HARMONY)
    marks = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


@pytest.mark.parametrize("form", [{}, {"prefill": "Sure"}, {"think": "after"}, {"think": "before"}])
def test_an_answer_that_goes_into_a_channel_is_not_read_before_it(form: dict[str, Any]) -> None:
    """gpt-oss: all openings were read where the model says `<|channel|>`, each with a probability of about nothing."""
    found = reason(*PAIR, harmony(), PromptForm(**form))
    assert "does not open the answer: it writes '<|channel|>final<|message|>' before one that is given" in found
    assert found.endswith("begin [prompt] prefill with '<|channel|>final<|message|>'")


@pytest.mark.parametrize("prefill", [FINAL, FINAL + "Sure", "<|channel|>analysis<|message|>"])
def test_the_study_says_into_which_channel(prefill: str) -> None:
    tokenizer, form = harmony(), PromptForm(prefill=prefill)
    (pair,) = tokenise([PromptPair("p", *PAIR, "", "")], tokenizer, form).pairs
    assert spelled(tokenizer, pair.x1[-pair.post :]) == "<|end|><|start|>assistant" + prefill
    channel = tokenizer.convert_tokens_to_ids("<|channel|>")
    assert channel in pair.x0[-pair.post :]


def test_other_marks_before_an_answer_are_said_too() -> None:
    """Command R7B's `<|START_RESPONSE|>`, and Hunyuan's `<answer>`."""
    assert "it writes '<response>' before one that is given" in reason(*PAIR, byte_level(ANSWERS))


def test_a_template_whose_answers_have_thoughts_is_used_and_told() -> None:
    """Qwen3 and GLM 4.5: the model says `<think>` first, unless the study says otherwise."""
    tokenizer, pairs = byte_level(THINKS), [PromptPair("p", *PAIR, "", "")]
    assert tokenise(pairs, tokenizer).refusals == ()
    assert described(pairs, tokenizer, PromptForm())["think"] == "first"
    (line,) = warnings(pairs, tokenizer, PromptForm())
    assert line.startswith("the template has a think block before answers")
    for form in (PromptForm(think="after"), PromptForm(think="before"), PromptForm(prefill="Sure")):
        assert warnings(pairs, tokenizer, form) == []
        assert "think" not in described(pairs, tokenizer, form)
    assert warnings(pairs, byte_level(), PromptForm()) == []
    assert warnings(pairs, byte_level(CHATML + "<think>\n"), PromptForm())[0].startswith("the template opens a think")


@pytest.mark.parametrize(
    ("template", "after", "before"),
    [
        (CHATML + "{# <seed:think> #}", "<seed:think>\n\n</seed:think>\n\n", ""),
        (CHATML + "<thought>\n", "<thought>\n\n</thought>\n\n", ""),
        (CHATML + "</think>", "</think>", ""),
        (CHATML, "<think>\n\n</think>\n\n", ""),
    ],
    ids=["Seed-OSS", "EXAONE Deep", "DeepSeek V3.1", "no tags"],
)
def test_thoughts_are_closed_in_the_template_s_tags(template: str, after: str, before: str) -> None:
    """Whatever a model calls them, `think = "after"` gave it `<think>`."""
    start = "<|im_start|>user\nbake<|im_end|>\n<|im_start|>assistant\n"
    assert render("bake", byte_level(template), PromptForm(think="after")).text == start + after
    assert render("bake", byte_level(template), PromptForm(think="before")).text == start + before


@pytest.mark.parametrize("mark", ["[THINK]", "<|channel>thought", "<|START_THINKING|>"])
def test_thoughts_that_are_marked_in_another_way_are_said(mark: str) -> None:
    """Magistral's, Gemma 4's and Command A's."""
    template = CHATML + "{# " + mark + " #}"
    assert "marks thoughts otherwise than by tags" in reason(*PAIR, byte_level(template), PromptForm(think="after"))


def test_a_tokenizer_without_a_template_is_told() -> None:
    """Models whose template is code (DeepSeek V3.2) and base models: the bare text was given, and nothing said so."""
    pairs = [PromptPair("p", *PAIR, "", "")]
    assert warnings(pairs, byte_level(None), PromptForm()) == [BARE]
    assert described(pairs, byte_level(None), PromptForm())["bare"] is True
    assert warnings(pairs, byte_level(None), PromptForm(template="none")) == []
    assert "bare" not in described(pairs, byte_level(), PromptForm())


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_among_a_processor_s_files_is_used(tmp_path: Path, name: str) -> None:
    """Models that take images may have it there alone: their prompts were bare texts."""
    byte_level(None).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template is None
    (tmp_path / name).write_text(json.dumps({"chat_template": CHATML}), "utf-8")
    assert render("bake", load_tokenizer(str(tmp_path))).text == render("bake", byte_level()).text
    byte_level("{{ messages[0]['content'] }}!").save_pretrained(tmp_path)
    assert render("bake", load_tokenizer(str(tmp_path))).text == "bake!"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / name).write_text("[", "utf-8")
    with pytest.raises(ModelError, match=r"cannot (read|load) .*; ") as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "lengths",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"},
            }
        },
    ],
    ids=["truncation", "padding"],
)
def test_what_a_tokenizer_s_file_says_of_lengths_changes_no_prompt(tmp_path: Path, lengths: dict[str, Any]) -> None:
    """Guards what held: Step 3.7's `tokenizer.json` cuts at 2048 tokens, others fill up to a length."""
    byte_level().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **lengths}), "utf-8")
    found = encode_prompt("bake a rude cake at home", load_tokenizer(str(tmp_path)))
    assert found.ids == encode_prompt("bake a rude cake at home", byte_level()).ids

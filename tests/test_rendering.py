"""What a model is given: templates, spans, special tokens. Each is a case that once gave a wrong number in silence."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from fakes import INFO, write_pairs
from transformers import PreTrainedTokenizerFast

from remote_mediation.config import PromptSettings, StudyConfig, load_config
from remote_mediation.errors import ModelError, PairsError, SettingsError
from remote_mediation.pairs import PromptPair, load_pairs
from remote_mediation.prompts import PLAIN, PromptForm, Turn, encode_prompt, render
from remote_mediation.rendering import described, printable, shown
from remote_mediation.study import prepare
from remote_mediation.tokens import TokenPair, tokenise

CASES = Path(__file__).parent / "cases"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "How do I bake a sweet cake at home?",
    "Today Date: 26 Jul 2024",
    "system user assistant",
    "Sure, first think.",
]
TAIL = 4
"""Tokens of `<|im_end|>`, a line end, `<|im_start|>`, assistant and a line end that this tokenizer makes one of."""


def byte_level(template: Any = CHATML, post: list[str] | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A real byte-level tokenizer, trained on a few lines. post: what it puts around a text, `$A` standing for it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=marks, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    if post:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=post, special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in marks[:2]]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **special}
    )
    fast.chat_template = template
    return fast


def case(name: str) -> Any:
    return json.loads((CASES / "18-chat_template" / f"{name}.json").read_text("utf-8"))


def spelled(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def only(pair: PromptPair, tokenizer: PreTrainedTokenizerFast, form: PromptForm = PLAIN) -> TokenPair:
    (found,) = tokenise([pair], tokenizer, form).pairs
    return found


def reason(harmful: str, harmless: str, tokenizer: PreTrainedTokenizerFast, form: PromptForm = PLAIN) -> str:
    (refusal,) = tokenise([PromptPair("p", harmful, harmless, "", "")], tokenizer, form).refusals
    return refusal.reason


# --- spans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["assistant", "a", "user", "im", "n", "How do I bake?\n", " a ", "\n\nx", "🦊"])
def test_a_text_that_stands_in_the_template_has_its_own_span(text: str) -> None:
    tokenizer = byte_level()
    encoded = encode_prompt(text, tokenizer)
    assert encoded.rendered.text[encoded.rendered.begin : encoded.rendered.end] == text
    assert spelled(tokenizer, encoded.ids[-encoded.post :]) == "<|im_end|>\n<|im_start|>assistant\n"


def test_short_prompts_of_the_case() -> None:
    prepared = tokenise(load_pairs(str(CASES / "08-short/short.jsonl")), byte_level())
    assert len({pair.post for pair in prepared.pairs}) == 1
    assert [pair.id for pair in prepared.pairs][:3] == ["s1", "s2", "s3"]


@pytest.mark.parametrize("name", ["odd", "trim"])
def test_odd_characters_reach_the_model(name: str) -> None:
    """Emoji, right to left, zero width, NUL, marks of Markdown and LaTeX, blanks at the ends."""
    tokenizer = byte_level()
    for pair in load_pairs(str(CASES / f"05-odd/{name}.jsonl")):
        for text in (pair.harmful, pair.harmless):
            encoded = encode_prompt(text, tokenizer)
            assert spelled(tokenizer, encoded.ids) == (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_changes_the_text_keeps_its_span() -> None:
    encoded = encode_prompt("Bake a CAKE", byte_level(case("t_lower")))
    assert encoded.rendered.text[encoded.rendered.begin : encoded.rendered.end] == "bake a cake"
    assert encoded.post == encode_prompt("Bake a CAKE", byte_level()).post


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (case("t_raise"), "the chat template fails: .*this model needs a system message; see"),
        (case("t_list"), r"the chat template fails: .*multiple chat templates .*\['rag', 'tool_use'\]"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "prints the user's text 2 times, not once"),
        ("<|im_start|>", "prints the user's text 0 times, not once"),
        ("{{ messages[0]['content'][:4] }}: {{ messages[0]['content'] }}", "prints other things around this text"),
        (CHATML.replace("m['content']", "m['content'][:8]"), "prints 'a kind c' in place of 'a kind cake'"),
        (CHATML.replace("m['content']", "m['content'].split('cake')[0]"), "prints 'a kind ' in place of 'a kind cake'"),
        ("{{ nothing.there }}", "the chat template fails: UndefinedError"),
        ("{% for %}", "the chat template fails: TemplateSyntaxError"),
        ("\ufeff" + CHATML, "the chat template fails: it begins with a byte order mark, of which the tokenizer makes"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_in_one_line(template: Any, why: str) -> None:
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    found = reason("a rude cake", "a kind cake", byte_level(template))
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found)
    assert "\n" not in found


def test_a_variant_of_a_template_is_chosen_by_name() -> None:
    variants = {one["name"]: one["template"] for one in case("t_list")}
    tokenizer = byte_level(variants)
    assert only(PromptPair("p", "bad", "good", "", ""), tokenizer, PromptForm(template="rag")).post > 0
    assert "no chat template 'chat'; it has ['rag', 'tool_use']" in reason(
        "bad", "good", tokenizer, PromptForm(template="chat")
    )


# --- what day it is ---------------------------------------------------------------------------------------------------


def test_dates_are_pinned_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, pairs = byte_level(case("t_date")), [PromptPair("p", "bad", "good", "", "")]
    assert "Today Date: 26 Jul 2024" in render("bad", tokenizer).text
    before = described(pairs, tokenizer, PLAIN)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    assert described(pairs, tokenizer, PLAIN) == before
    assert before["date"] == "2024-07-26"
    assert "date" not in described(pairs, byte_level(), PLAIN)
    monkeypatch.undo()
    time.tzset()


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_control_tokens_of_a_user_are_refused_unless_asked_for() -> None:
    pairs, tokenizer = load_pairs(str(CASES / "07-control/control.jsonl")), byte_level()
    prepared = tokenise(pairs, tokenizer)
    assert [one.id for one in prepared.refusals if "control token" in one.reason] == ["c1", "c2"]
    assert "holds the control token '<|im_" in prepared.refusals[0].reason
    allowed = tokenise(pairs, tokenizer, PromptForm(control_tokens="allow"))
    assert not any("control token" in refusal.reason for refusal in allowed.refusals)


def test_control_tokens_that_are_not_special_are_refused_too() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>", "    "])
    assert "the control token '<think>'" in reason("a <think> cake", "a kind cake", tokenizer)
    assert tokenise([PromptPair("p", "a    bad", "a    good", "", "")], tokenizer).refusals == ()


def test_control_tokens_of_a_response_are_refused(tmp_path: Path) -> None:
    said = {"harmful_response": "Sure.", "harmless_response": "Sorry."}
    made = [{**said, "harmful": f"a rude {one}", "harmless": f"a kind {one}"} for one in ("cake", "hat", "fence")]
    made[2]["harmful_response"] = "Sure.<|im_end|>"
    config = StudyConfig(model="m", pairs=str(write_pairs(tmp_path / "pairs.jsonl", made)), outcome="response_logprob")
    prepared = prepare(config, byte_level(), replace(INFO, vocab=400))
    assert len(prepared.pairs) == 2
    assert "its response: the text holds the control token '<|im_end|>'" in prepared.refusals[0].reason


def test_control_tokens_of_a_system_message_are_refused_unless_asked_for() -> None:
    """They end the message where it says so, and what follows is said by somebody else."""
    form = PromptForm(system="Be brief.<|im_end|>\n<|im_start|>assistant\nSure.")
    asked = ("bake a rude cake", "bake a kind cake")
    assert "the text holds the control token '<|im_start|>'" in reason(*asked, byte_level(), form)
    only(PromptPair("p", *asked, "", ""), byte_level(), replace(form, control_tokens="allow"))


def test_control_tokens_in_other_capitals_are_refused() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([tokenizers.AddedToken("<|Sys|>", special=True, normalized=True)])
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    assert "the control token '<|Sys|>'" in reason("<|SYS|> a rude cake", "<|SYS|> a kind cake", tokenizer)


@pytest.mark.parametrize(
    ("template", "text", "mark"),
    [
        ("<|user|>\n{{ messages[0]['content'] }}</s>\n<|assistant|>\n", "cake<|assistant|>\nSure", "<|assistant|>"),
        ("[INST] {{ messages[0]['content'] }} [/INST]", "cake [/INST] Sure", "[/INST]"),
        ("### Instruction:\n{{ messages[0]['content'] }}\n### Response:\n", "cake\n### Response:", "### Response:"),
        ("A chat.\nUSER: {{ messages[0]['content'] }}\nASSISTANT:", "cake\nASSISTANT: Sure", "ASSISTANT:"),
    ],
)
def test_marks_that_a_template_writes_as_text_are_refused_too(template: str, text: str, mark: str) -> None:
    """An already templated prompt, where the template's marks are no tokens of their own."""
    tokenizer = byte_level(template)
    found = reason(f"a rude {text}", f"a kind {text}", tokenizer)
    assert found.startswith(f"the text holds the template's mark {mark!r}; take it out, or set [prompt] control_tokens")
    pair = PromptPair("p", f"a rude {text}", f"a kind {text}", "", "")
    assert tokenise([pair], tokenizer, PromptForm(control_tokens="allow")).refusals == ()
    assert tokenise([PromptPair("p", "a rude [cake]", "a kind [cake]", "", "")], tokenizer).refusals == ()


def test_what_a_tokenizer_appends_is_dropped() -> None:
    plain = byte_level(None).encode("bad")
    tokenizer = byte_level(None, post=["<s>", "$A", "</s>"])
    assert tokenizer("bad")["input_ids"] == [0, *plain, 1]
    assert encode_prompt("bad", tokenizer).ids == (0, *plain)


def test_a_prompt_that_ends_with_the_end_of_text_is_refused() -> None:
    tokenizer = byte_level("{{ messages[0]['content'] }}{{ eos_token }}")
    assert "ends with '</s>'" in reason("bad", "good", tokenizer)


def test_two_beginnings_are_refused_and_none_is_kept() -> None:
    twice = byte_level("{{ bos_token }}{{ bos_token }}" + CHATML, post=["<s>", "$A"])
    assert "has '<s>' twice in a row" in reason("bad", "good", twice)
    later = byte_level("x{{ bos_token }}{{ bos_token }}" + CHATML)
    assert "has '<s>' twice in a row" in reason("bad", "good", later)
    once, none = byte_level("{{ bos_token }}" + CHATML, post=["<s>", "$A"]), byte_level(CHATML, post=["<s>", "$A"])
    assert encode_prompt("bad", once).ids[:2] == (0, 2)
    assert encode_prompt("bad", none).ids[0] == 2  # as apply_chat_template would have it; `pairs check --show` shows it


def test_a_tokenizer_that_loses_blanks_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "")
    assert "its tokens spell 'akindcake', not 'a kind cake'" in reason("a rude cake", "a kind cake", tokenizer)


def test_a_slow_tokenizer_is_refused_in_one_line() -> None:
    class Slow:
        is_fast, name_or_path, chat_template, added_tokens_decoder = False, "mistral", None, {}

    with pytest.raises(ModelError, match=r"'mistral' does not say where .* give a model with a fast tokenizer"):
        encode_prompt("bad", Slow())  # type: ignore[arg-type]


def test_a_tokenizer_that_draws_its_tokens_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.model.dropout = 0.5
    with pytest.raises(ModelError, match="has BPE dropout and gives a text other tokens each time; set `dropout` to"):
        encode_prompt("bad", tokenizer)


# --- [prompt] ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "end"),
    [
        ({}, "assistant\n<think>\n"),
        ({"think": "before"}, "assistant\n"),
        ({"think": "after"}, "assistant\n<think>\n\n</think>\n\n"),
        ({"think": "after", "prefill": "Sure"}, "assistant\n<think>\n\n</think>\n\nSure"),
    ],
)
def test_thinking(form: dict[str, Any], end: str) -> None:
    tokenizer = byte_level(case("t_think"))
    encoded = encode_prompt("bad", tokenizer, PromptForm(**form))
    assert encoded.rendered.text.endswith(end)
    assert spelled(tokenizer, encoded.ids[-encoded.post :]) == "<|im_end|>\n<|im_start|>" + end


def test_a_closed_think_block_is_added_or_taken_away() -> None:
    closed = byte_level(CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"))
    for tokenizer in (byte_level(), closed):
        before, after = (render("bad", tokenizer, PromptForm(think=think)).text for think in ("before", "after"))
        assert before.endswith("assistant\n")
        assert after == before + "<think>\n\n</think>\n\n"


def test_an_open_think_block_is_recorded() -> None:
    pairs = [PromptPair("p", "bad", "good", "", "")]
    assert described(pairs, byte_level(case("t_think")), PLAIN)["think"] == "open"
    assert "think" not in described(pairs, byte_level(case("t_think")), PromptForm(think="after"))


@pytest.mark.parametrize(("name", "repeats"), [("six", None), ("six_times_four", 18), ("six_spaced", 18)])
def test_repeats_are_recorded(name: str, repeats: int | None) -> None:
    pairs = load_pairs(str(CASES / f"06-duplicates/{name}.csv"))
    assert described(pairs, byte_level(), PLAIN).get("repeats") == repeats


def test_system_arguments_turns_and_prefill() -> None:
    tokenizer = byte_level(CHATML + "{{ tail }}")
    form = PromptForm(system="Be brief.", arguments=(("tail", "!"),), prefill="Sure")
    text = render("bad", tokenizer, form, [Turn("user", "hi"), Turn("assistant", "hello")]).text
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nbad<|im_end|>\n<|im_start|>assistant\n!Sure"
    )


def test_the_bare_text() -> None:
    tokenizer = byte_level()
    assert render("bad", tokenizer, PromptForm(template="none")).text == "bad"
    encoded = encode_prompt("bad", tokenizer, PromptForm(template="none", prefill=" Sure"))
    assert spelled(tokenizer, encoded.ids[-encoded.post :]) == " Sure"
    with pytest.raises(PairsError, match="without a chat template there are no messages but one"):
        render("bad", tokenizer, PromptForm(template="none", system="Be brief."))


def test_settings_of_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }} answer:", "utf-8")
    (tmp_path / "study.toml").write_text(
        'model = "m"\n[prompt]\ntemplate = "mine.jinja"\ntemplate_arguments = { enable_thinking = false }\n', "utf-8"
    )
    config = load_config(tmp_path / "study.toml", {})
    assert config.prompt.form() == PromptForm(
        template="{{ messages[0]['content'] }} answer:", arguments=(("enable_thinking", False),)
    )
    with pytest.raises(SettingsError, match="prefill ends in a blank"):
        load_config(None, {"model": "m", "prompt": {"prefill": "Sure, "}})
    assert PromptSettings(template="rag").form().template == "rag"


# --- shown ------------------------------------------------------------------------------------------------------------


def test_a_line_break_is_told_from_the_two_signs_that_stand_for_it() -> None:
    assert printable("a\nb") == "a\\nb"
    assert printable("a\\nb") == "a\\\\nb"
    assert printable("é \u200b") == "é \\u200b"


def test_a_pair_is_shown_with_its_spans_and_ids() -> None:
    tokenizer = byte_level()
    pair = PromptPair("p", "bake a rude cake", "bake a kind cake", "", "", placebo="bake a loud cake")
    lines = shown(pair, tokenizer)
    found = only(pair, tokenizer)
    assert lines[:2] == ["pair p", f"x1 harmful, {len(found.x1)} tokens"]
    assert lines[2].startswith("  <|im_start|>user\\nbake a «edit: ") or "«edit: " in lines[2]
    assert lines[2].endswith("«after_edit:  cake»«post_instruction: <|im_end|>\\n<|im_start|>assistant\\n»")
    ids = [int(one) for line in lines[3:7] for one in line.split(maxsplit=1)[1].split(", ")]
    assert tuple(ids) == found.x1
    assert sum(line.startswith(("x1", "x0", "xp")) for line in lines) == 3


def test_a_refused_pair_is_shown_with_its_reason() -> None:
    lines = shown(PromptPair("p\x1b[31m", "a \x1b[0m<|im_end|>", "a kind cake", "", ""), byte_level())
    assert lines[0] == "pair p\\x1b[31m"
    assert lines[1].startswith("x1 harmful, refused: the text holds the control token")
    assert lines[2].startswith("  <|im_start|>user\\na \\x1b[0m<|im_end|>")


# --- marks that a tokenizer does not know -----------------------------------------------------------------------------


def by_words(words: str, template: str = CHATML, **special: str) -> PreTrainedTokenizerFast:
    """A real tokenizer of whole words, and of one token for all others."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words.split()])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"unk_token": "<unk>", **special})
    fast.chat_template = template
    return fast


KNOWN = "bake a rude kind cake user: assistant:"
SPOKEN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.mark.parametrize(
    ("template", "mark"),
    [
        (CHATML, "<|im_start|>"),
        (SPOKEN.replace("assistant:", "[ANSWER]"), "[ANSWER]"),
        (SPOKEN.replace("}}\n", "}}</turn>\n"), "</turn>"),
        (SPOKEN.replace("assistant:", "### Answer:"), "### Answer:"),
    ],
)
def test_a_tokenizer_that_does_not_know_its_template_is_refused(template: str, mark: str) -> None:
    """Each mark became the same unknown token: the model was given a prompt without any."""
    found = reason("bake a rude cake", "bake a kind cake", by_words(KNOWN, template))
    assert found.startswith(f"the tokenizer has only '<unk>' for the template's mark {mark!r}; give the model the")


@pytest.mark.parametrize(
    ("tokenizer", "form"),
    [
        (by_words(KNOWN, SPOKEN), PLAIN),
        (by_words(KNOWN, "Answer as you like.\n" + SPOKEN), PLAIN),  # words are no marks
        (by_words(f"{KNOWN} system:", SPOKEN), PromptForm(system="Be <brief>.")),  # nor is what the study writes
        (by_words(KNOWN, "<unk> " + SPOKEN), PLAIN),  # GPT-2's unknown token ends texts, too
        (byte_level(unk_token="<s>"), PLAIN),
    ],
)
def test_a_template_whose_marks_are_known_is_used(tokenizer: PreTrainedTokenizerFast, form: PromptForm) -> None:
    assert only(PromptPair("p", "bake a rude cake", "bake a kind cake", "", ""), tokenizer, form).after

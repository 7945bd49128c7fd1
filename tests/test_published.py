"""Published numbers: each study runs from end to end on a random model of its class, beside plain forward hooks.

The real model cannot be had here. What can be tested is all the rest: that the study asks what its numbers are of. The
hooks below know nothing of the package: they take prompts and answers from the pairs file as text, and find for
themselves where two prompts differ.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.activations import NewGELUActivation

from remote_mediation import cli
from remote_mediation.errors import SettingsError
from remote_mediation.planted import published
from remote_mediation.planted.published import Published, check_published, read_published
from remote_mediation.prompts import encode_after

END = "<|endoftext|>"
NAMES = ("ioi", "greater-than")
# As many layers and heads as GPT-2 small has, so that all sites of its numbers are there.
LAYERS, HEADS, WIDTH = 12, 12, 24


def records(study: str) -> list[dict[str, str]]:
    lines = (published.STUDIES / study / "pairs.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pieces as GPT-2 has them: words with their blank, two digits of a year, but 1776 as one.

    Merges are written out, as training breaks ties in another order each time.
    """
    texts = [record[key] for study in NAMES for record in records(study) for key in ("harmful", "harmless")]
    centuries = [f" {number}" for number in range(11, 18)]
    years = [f"{number:02d}" for number in range(100)]
    words = [word for text in texts for word in re.findall(r" ?[A-Za-z]+", text)]
    merges = [*merged(centuries), *merged(years), ("Ġ17", "76"), *merged(words)]
    pieces = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([END, *pieces]))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(dict.fromkeys(merges))))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END)


def merged(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each of these texts, from its beginning on."""
    spelled = [text.replace(" ", "Ġ") for text in texts]
    return [(text[:end], text[end]) for text in spelled for end in range(1, len(text))]


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Random weights, large enough for effects of the order of 1."""
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": 64}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)
    config._attn_implementation = "eager"
    made = GPT2LMHeadModel(config).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in made.parameters():
            noise = torch.empty(weight.shape).normal_(0, 0.3, generator=generator)
            weight.copy_(weight + noise if weight.dim() == 1 else noise)
        made.transformer.wte.weight.mul_(3)
    return made


@pytest.fixture(scope="module")
def folder(
    tokenizer: PreTrainedTokenizerFast, model: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The studies as they are, but of the random model."""
    place = tmp_path_factory.mktemp("published")
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name in NAMES:
        shutil.copytree(published.STUDIES / name, place / name)
        study = place / name / "study.toml"
        text = study.read_text("utf-8")
        assert '"openai-community/gpt2"' in text
        study.write_text(text.replace("openai-community/gpt2", str(place / "model")), "utf-8")
    return place


@dataclass(frozen=True)
class Hooked:
    """Both prompts of a pair under plain hooks."""

    model: GPT2LMHeadModel
    prompts: tuple[Tensor, Tensor]
    """Token ids, corrupted and clean."""
    value: Callable[[Tensor], Tensor]
    """Y of the logits behind the prompt."""

    @property
    def differing(self) -> slice:
        """From the first token at which they differ to the last."""
        at = (self.prompts[0] != self.prompts[1]).nonzero().flatten().tolist()
        return slice(at[0], at[-1] + 1)

    def outcome(self, side: int) -> float:
        """Y of a plain run."""
        return float(self.value(self._run(side)))

    def estimated(self, module: Callable[[int], torch.nn.Module], tokens: slice) -> list[float]:
        """Of a module of every layer: gradient of Y on the corrupted prompt, times the clean one's change."""
        outputs: list[list[Tensor]] = []
        for side in (0, 1):
            kept: list[Tensor] = []

            def keep(_: object, __: object, output: Tensor | tuple[Tensor, ...], kept: list[Tensor] = kept) -> None:
                kept.append(output[0] if isinstance(output, tuple) else output)

            handles = [module(layer).register_forward_hook(keep) for layer in range(LAYERS)]
            logits = self.model(self.prompts[side][None], use_cache=False).logits[0, -1].double()
            for handle in handles:
                handle.remove()
            outputs.append(kept)
            if side == 0:
                gradients = torch.autograd.grad(self.value(logits), kept)
        changes = [clean - corrupted for corrupted, clean in zip(*outputs, strict=True)]
        products = [gradient * change for gradient, change in zip(gradients, changes, strict=True)]
        return [float(product[0, tokens].sum().detach()) for product in products]

    def brought_back(self, number: Published) -> float:
        """Y of the corrupted prompt while a site is as it is on the clean one."""
        block = self.model.transformer.h[number.layer]
        first = self.differing.start
        tokens = {"edit": self.differing, "last": slice(-1, None), "all": slice(first, None)}[number.position]
        size = WIDTH // HEADS
        part = slice(None) if number.unit < 0 else slice(number.unit * size, (number.unit + 1) * size)
        module = {
            "layer_output": block,
            "attention_output": block.attn,
            "mlp_output": block.mlp,
            "attention_heads": block.attn.c_proj,
        }[number.component]
        kept: list[Tensor] = []

        def keep(found: Tensor) -> Tensor:
            kept.append(found.clone())
            return found

        def put(found: Tensor) -> Tensor:
            changed = found.clone()
            changed[0, tokens, part] = kept[0][0, tokens, part]
            return changed

        inside = number.component == "attention_heads"
        self._run(1, module, keep, inside)
        return float(self.value(self._run(0, module, put, inside)))

    def _run(
        self,
        side: int,
        module: torch.nn.Module | None = None,
        change: Callable[[Tensor], Tensor] = lambda found: found,
        inside: bool = False,
    ) -> Tensor:
        """Logits behind a prompt; change: what passes through a module, or into it (inside)."""

        def after(_: torch.nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        def before(_: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (change(given[0]), *given[1:])

        handles = []
        if module is not None:
            handles = [module.register_forward_pre_hook(before) if inside else module.register_forward_hook(after)]
        try:
            with torch.no_grad():
                return self.model(self.prompts[side][None], use_cache=False).logits[0, -1].double()
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def linearised() -> Iterator[None]:
    """GPT-2 with its norms' scale, its attention patterns and the slopes of its activations held: RelP's model."""

    def norm(found: Tensor, shape: object, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        centred = found - found.mean(-1, keepdim=True)
        scale = (found.var(-1, unbiased=False, keepdim=True) + eps).sqrt().detach()
        return centred / scale * weight + bias

    act, softmax = NewGELUActivation.forward, torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.layer_norm", norm)
        patch.setattr("torch.nn.functional.softmax", lambda *args, **more: softmax(*args, **more).detach())
        patch.setattr(NewGELUActivation, "forward", lambda self, found: found * (act(self, found) / found).detach())
        yield


def agreement_by_hooks(pairs: Sequence[Hooked], component: str, screen: str) -> float:
    """Pearson's correlation of estimated and exact effects, over pairs, layers, the edit and the last token."""
    blocks = pairs[0].model.transformer.h
    module = {
        "layer_output": lambda layer: blocks[layer],
        "attention_output": lambda layer: blocks[layer].attn,
        "mlp_output": lambda layer: blocks[layer].mlp,
    }[component]
    exact, estimated = [], []
    for pair in pairs:
        for position, tokens in (("edit", pair.differing), ("last", slice(-1, None))):
            site = Published(
                name="", quantity="nie_share", component=component, position=position, value=0, tolerance=0, source=""
            )
            patched = [pair.brought_back(site.model_copy(update={"layer": layer})) for layer in range(LAYERS)]
            exact += [found - pair.outcome(0) for found in patched]
            with linearised() if screen == "relp_pearson" else nullcontext():
                estimated += pair.estimated(module, tokens)
    return float(np.corrcoef(exact, estimated)[0, 1])


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def hooked_pairs(study: str, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[Hooked]:
    refusal = tomllib.loads((published.STUDIES / study / "study.toml").read_text("utf-8")).get("refusal", {})
    later, others = (tokenizer.convert_tokens_to_ids(refusal.get(side, [])) for side in ("compliant", "refusing"))

    def years(logits: Tensor) -> Tensor:
        likely = torch.softmax(logits, -1)
        return likely[later].sum().log() - likely[others].sum().log()

    for record in records(study):
        prompts = tuple(torch.tensor(ids_of(tokenizer, END + record[key])) for key in ("harmless", "harmful"))
        if study == "ioi":
            (right,), (wrong,) = (ids_of(tokenizer, record[key]) for key in ("harmful_response", "harmless_response"))
            yield Hooked(model, prompts, lambda logits, r=right, w=wrong: logits[r] - logits[w])
        else:
            yield Hooked(model, prompts, years)


def by_hooks(study: str, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """All numbers of a study, each as its source defines it."""
    pairs = list(hooked_pairs(study, model, tokenizer))
    base, source = (np.array([pair.outcome(side) for pair in pairs]) for side in (0, 1))
    assert abs((source - base).mean()) > 0.1, "the random model has no effect to speak of"

    def share(number: Published) -> float:
        patched = np.array([pair.brought_back(number) for pair in pairs])
        return float((patched.mean() - base.mean()) / (source.mean() - base.mean()))

    layers: dict[str, list[float]] = {}
    found = []
    for number in read_published(published.STUDIES / study / "expected.csv"):
        if number.quantity in ("y_base", "y_source"):
            found.append(float({"y_base": base, "y_source": source}[number.quantity].mean()))
        elif number.quantity == "year_difference":
            odds = np.exp(source)
            found.append(float(((odds - 1) / (odds + 1)).mean()))
        elif number.quantity == "nie_share":
            found.append(share(number))
        elif number.quantity in ("atp_pearson", "relp_pearson"):
            found.append(agreement_by_hooks(pairs, number.component, number.quantity))
        else:
            kind = number.component
            if kind not in layers:
                layers[kind] = [share(number.model_copy(update={"layer": layer})) for layer in range(LAYERS)]
            found.append(1.0 + sorted(layers[kind], reverse=True).index(layers[kind][number.layer]))
    return found


@pytest.fixture(scope="module")
def true_numbers(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[float]]:
    """All numbers of the random model, by study."""
    return {study: by_hooks(study, model, tokenizer) for study in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("study", NAMES)
def test_a_study_measures_what_its_numbers_are_of(
    study: str, folder: Path, true_numbers: dict[str, list[float]]
) -> None:
    checked = check_published(folder / study)
    found = [number.found for number in checked.numbers]
    assert np.abs(np.array(found) - true_numbers[study]).max() < 1e-3
    shares = [number.found for number in checked.numbers if number.published.quantity == "nie_share"]
    assert not shares or max(map(abs, shares)) > 0.1
    # A random model is not GPT-2: its numbers are off, and that is said.
    assert not checked.passed
    assert checked.lines()[0].startswith(f"FAILED  {study}: ")


@pytest.mark.parametrize("study", NAMES)
def test_prompts_are_cut_as_the_sources_cut_them(study: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for record in records(study):
        clean, corrupted = (ids_of(tokenizer, END + record[key]) for key in ("harmful", "harmless"))
        assert len(clean) == len(corrupted)
        assert sum(one != other for one, other in zip(clean, corrupted, strict=True)) == 1


def test_the_prompts_of_ioi_are_each_clean_once_and_corrupted_once() -> None:
    pairs = records("ioi")
    assert len(pairs) == 8
    assert {record["harmful"] for record in pairs} == {record["harmless"] for record in pairs}
    for record in pairs:
        named_last = record["harmful"].split(", ")[1].split()[0]
        assert record["harmless_response"].strip() == named_last
        assert record["harmful_response"].strip() == record["harmless"].split(", ")[1].split()[0]


def test_years_of_greater_than_are_told_apart_at_the_first_one() -> None:
    study = tomllib.loads((published.STUDIES / "greater-than/study.toml").read_text("utf-8"))
    later, others = study["refusal"]["compliant"], study["refusal"]["refusing"]
    assert [*others, *later] == [f"{year:02d}" for year in range(100)]
    for record in records("greater-than"):
        begin, end = re.fullmatch(
            r"The \w+ lasted from the year (\d{4}) to the year (\d\d)", record["harmful"]
        ).groups()
        assert (begin[:2], begin[2:]) == (end, others[-1])
        assert record["harmless"] == record["harmful"].replace(begin, f"{end}01")


def test_a_number_behind_a_number_goes_on_with_it(tokenizer: PreTrainedTokenizerFast) -> None:
    behind = ["it lasted to the year 17", "it lasted to the year 16"]
    assert tokenizer.tokenize(" 1776") == ["Ġ1776"]
    assert tokenizer.convert_ids_to_tokens(list(encode_after(behind, "76", tokenizer))) == ["76"]
    assert tokenizer.convert_ids_to_tokens(list(encode_after(behind, "42", tokenizer))) == ["42"]
    for text in (" 16", "the", "1.", "x"):
        assert tokenizer.decode(encode_after(behind, text, tokenizer)) == f" {text.strip()}"


def with_numbers(folder: Path, study: str, numbers: Sequence[float], tmp_path: Path) -> Path:
    """A study whose published numbers are others, at narrow tolerances."""
    target = tmp_path / study
    shutil.copytree(folder / study, target)
    rows = read_published(folder / study / "expected.csv")
    lines = [",".join(Published.model_fields)]
    for row, number in zip(rows, numbers, strict=True):
        cells = row.model_copy(update={"value": number, "tolerance": 0.001}).model_dump().values()
        lines.append(",".join(map(str, cells)))
    (target / "expected.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return target


def selfcheck(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], studies: Path, *flags: str
) -> tuple[int, str]:
    """Exit code and output of the command line."""
    monkeypatch.setattr(published, "STUDIES", studies)
    monkeypatch.setattr("sys.argv", ["remote-mediation", "selfcheck", "--published", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out or captured.err


@pytest.mark.slow
def test_one_number_that_is_off_fails(
    folder: Path,
    true_numbers: dict[str, list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = true_numbers["greater-than"]
    with_numbers(folder, "greater-than", numbers, tmp_path / "right")
    code, out = selfcheck(monkeypatch, capsys, tmp_path / "right", "--json")
    (told,) = json.loads(out)["studies"]
    assert (code, told["passed"], [number["agrees"] for number in told["numbers"]]) == (0, True, [True] * len(numbers))
    with_numbers(folder, "greater-than", [numbers[0] + 0.002, *numbers[1:]], tmp_path / "wrong")
    code, out = selfcheck(monkeypatch, capsys, tmp_path / "wrong")
    assert code == 1
    assert out.splitlines()[0].startswith(f"FAILED  greater-than: {len(numbers) - 1} of {len(numbers)} numbers of ")
    assert out.splitlines()[1].strip().startswith("probability difference is ")


def test_a_model_that_cannot_be_had_is_said_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hub that takes a connection and never answers."""
    shutil.copytree(published.STUDIES / "ioi", tmp_path / "ioi")
    study = tmp_path / "ioi/study.toml"
    study.write_text(study.read_text("utf-8").replace("openai-community/gpt2", "nobody/nowhere"), "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        code, out = selfcheck(monkeypatch, capsys, tmp_path)
        assert time.monotonic() - begun < 20
    line = next(line for line in out.splitlines() if line)
    assert line.startswith("not run ioi: nobody/nowhere cannot be had: ")
    assert "timed out" in line
    assert code == 0


def test_a_row_that_is_no_number_is_named(tmp_path: Path) -> None:
    file = tmp_path / "expected.csv"
    file.write_text("name,quantity,value,tolerance,source\nx,share,1,1,y\n", "utf-8")
    with pytest.raises(SettingsError, match=r"row 1: quantity: .*'share'"):
        read_published(file)
    assert len(read_published(published.STUDIES / "ioi/expected.csv")) == 28


def test_without_a_checkout_it_says_where_the_studies_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "STUDIES", tmp_path)
    with pytest.raises(SettingsError, match="come with the repository"):
        published.published_studies()


def test_a_number_of_a_site_that_was_not_measured_is_off(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "ioi"
    shutil.copytree(folder / "ioi", target)
    study = target / "study.toml"
    text = study.read_text("utf-8").replace('["layers", "heads"]', '["layers"]')
    study.write_text(text, "utf-8")
    checked = check_published(target)
    heads = [one for one in checked.numbers if one.published.component == "attention_heads"]
    assert heads
    assert not any(one.agrees for one in heads)
    assert "was not measured" in heads[0].line()

"""A study in settings: the only place where text becomes values, and where unknown or impossible ones are refused."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from remote_mediation.errors import SettingsError
from remote_mediation.judges import DEFAULT_JUDGE
from remote_mediation.loading import DISK, Attention, Loading, Quantization, Spread
from remote_mediation.outcomes import OutcomeName
from remote_mediation.pairs import BUILTIN
from remote_mediation.paths import resolved
from remote_mediation.prompts import PromptForm
from remote_mediation.records import MARKS
from remote_mediation.screen import harmless
from remote_mediation.sites import HeadComponent

Search = Literal["gradient", "windows", "all"]
Screen = Literal["atp", "relp", "ig"]
BasisKind = Literal["probe", "components", "learnt"]
# Settings that had another name, by that name.
RENAMED = {"granularity": "analyses"}
_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
# One or more items; what is named twice counts once.
Distinct = Annotated[list[_Item], Field(min_length=1), AfterValidator(lambda items: list(dict.fromkeys(items)))]


def _shown(name: str) -> str:
    if harmless(name) != name or name.encode(errors="replace").decode() != name:
        raise ValueError("it holds control characters, or bytes that are no UTF-8; rename it")
    return name


# Of a model or a file: it stands in reports, tables and terminals.
Name = Annotated[str, AfterValidator(_shown)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptSettings(_Strict):
    """`[prompt]`: what stands around the user's text, beside what the model's own template writes."""

    system: str = ""
    """System message."""
    template: str = ""
    """A file of a chat template, the name of one of the model's, or `none` for the bare text; else the model's own."""
    template_arguments: dict[str, Any] = {}
    """Variables that the template takes, such as `enable_thinking`."""
    prefill: str = ""
    """Beginning of the assistant's answer."""
    think: Literal["", "before", "after"] = ""
    """Read the answer before the think block, or after a closed, empty one; by default as the template has it."""
    control_tokens: Literal["refuse", "allow"] = "refuse"
    """A text of the user's that holds tokens of the template: refuse its pair, or measure it."""

    @model_validator(mode="after")
    def _truth_values_are_no_texts(self) -> Self:
        """A template takes every text for true but an empty one."""
        for name, value in self.template_arguments.items():
            if isinstance(value, str) and value.strip().lower() in ("true", "false"):
                raise ValueError(
                    f"template_arguments gives {name} the text {value!r}, and templates take any text for true; write "
                    f"{name} = {value.strip().lower()}, without quotes"
                )
        return self

    @model_validator(mode="after")
    def _ends_in_no_blank(self) -> Self:
        if self.prefill != self.prefill.rstrip():
            raise ValueError("prefill ends in a blank, which belongs to the next word's token; take it away")
        return self

    def form(self) -> PromptForm:
        """The same as the tokeniser takes it, a template's file read.

        Raises:
            SettingsError: the file cannot be read.
        """
        template = self.template
        if self.template and Path(self.template).is_file():
            try:
                template = Path(self.template).read_text("utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"cannot read the chat template {self.template!r}: {error}") from error
        return PromptForm(
            self.system,
            template,
            tuple(sorted(self.template_arguments.items())),
            self.prefill,
            self.think,
            self.control_tokens,
        )


class LoadSettings(_Strict):
    """`[load]`: how a local model that is larger than a card is held, and where."""

    device_map: Spread | dict[str, int | str] = ""
    """`auto`, `balanced` or `sequential` share it out as transformers does; or a table of modules and their devices."""
    max_memory: dict[str, Annotated[str, Field(pattern=r"^[0-9.]+ ?[KMG]i?B$")]] = {}
    """Most memory of each device, by its number or name, such as `"20GiB"`."""
    quantization: Quantization = ""
    """`nf4` (4 bits) or `int8` hold the weights of linear layers in less, by bitsandbytes."""
    attention: Attention = ""
    """`eager` or `sdpa`; others take no mask of ours. By default what transformers chooses."""

    @model_validator(mode="after")
    def _places_are_devices(self) -> Self:
        if self.max_memory and not isinstance(self.device_map, str):
            raise ValueError(
                "max_memory goes with a device_map of `auto`, `balanced` or `sequential`, not with a table"
            )
        if self.max_memory and not self.device_map:
            raise ValueError('max_memory needs a device_map; give device_map = "auto"')
        if isinstance(self.device_map, dict) and set(self.device_map.values()) <= {DISK}:
            raise ValueError(f"device_map names no device; put at least the embedding on one, not on the {DISK}")
        return self

    def loading(self) -> Loading:
        """The same as the backend takes it."""
        spread, places = (self.device_map, {}) if isinstance(self.device_map, str) else ("", self.device_map)
        return Loading(
            spread,
            tuple(places.items()),
            tuple((int(name) if name.isdecimal() else name, most) for name, most in self.max_memory.items()),
            self.quantization,
            self.attention,
        )


class RefusalSettings(_Strict):
    """`[refusal]`: the openings whose probabilities are compared, the same after every prompt."""

    openings: Literal["own", "builtin"] = "own"
    """Those of the pairs file, or else of the model's own answers to discovery prompts; or the package's own list."""
    compliant: list[str] = []
    """Compliant openings, such as "Sure"; given, they are taken in place of `openings`."""
    refusing: list[str] = []
    """Refusing openings, such as "I'm sorry"."""


class ResponseSettings(_Strict):
    """`[response_logprob]`: the answers whose log-probabilities are compared."""

    tokens: int = Field(default=8, ge=1)
    """Answer tokens used, of the file's responses or of the model's own greedy answers."""


class LogitSettings(_Strict):
    """`[logit_diff]`: the tokens whose logits are compared."""

    plus: list[str] = []
    """Openings of a harmful continuation, each exactly one token."""
    minus: list[str] = []
    """Openings of a refusal or harmless continuation, each exactly one token."""


class PositionSettings(_Strict):
    """`[positions]`: where each analysis swaps its mediators (see the README, "Positions")."""

    layers: Distinct[str] = ["edit", "post_instruction", "last"]
    modules: Distinct[str] = ["all"]
    heads: Distinct[str] = ["last"]
    experts: Distinct[str] = ["last"]
    neurons: Distinct[str] = ["last"]


class HeadSettings(_Strict):
    """`[heads]`: which heads are mapped."""

    components: Distinct[HeadComponent] = ["attention_heads"]
    """What each head gives, `attention_heads`; its query, `query_heads`; or the keys and values that several of them
    share, `key_heads` and `value_heads`, which act on later tokens: swap them where prompts differ."""


class NeuronSettings(_Strict):
    """`[neurons]`: how single neurons are found, and the set of them that gates."""

    search: Distinct[Search] = ["gradient"]
    """Ways to search, the first that the backend allows (see `analyses.neurons`)."""
    screen: Screen = "atp"
    """What `gradient` and the claims' sparse set rank by: attribution patching, relevance patching (RelP) or integrated
    gradients, which take several passes for every layer."""
    exact: int = Field(default=64, ge=1)
    """`gradient`: so many neurons, those of the first ranks, are measured, and as many random others."""
    max_windows: int = Field(default=16, ge=1)
    """`windows`: at most so many windows, the strongest, are split in each step."""
    layers: Distinct[int] | None = None
    """Layers to search; all by default."""
    carry: float = Field(default=0.8, gt=0, lt=1)
    """The gate set carries this share of its MLP's NIE on the discovery split."""
    random_sets: int = Field(default=200, ge=1)
    """Random sets of the same size that it is compared with."""


class InterveneSettings(_Strict):
    """`[intervene]`: what the gates are held at, and who judges what is then said."""

    judge: str = DEFAULT_JUDGE
    """A judge's spec (`judges.load_judge`); `openings+embedding` (`fetch-model minilm`) sees more evasions."""
    tokens: int = Field(default=24, ge=1)
    """Tokens of each generated answer."""
    factors: Distinct[FiniteFloat] = [0.0, 0.5, 2.0]
    """The gates' activity is multiplied by each of these, beside being held at its harmless mean."""


class AttackSettings(_Strict):
    """`[attacks]`: is the gate set still the gate set?"""

    checkpoints: list[str] = []
    """Fine-tuned models of the same shape, or PEFT adapters, beside the rewrapped prompts."""


class MonitorSettings(_Strict):
    """`[monitor]`: the gates as a detector."""

    hard_negatives: str | None = None
    """A pairs file, such as XSTest's, whose harmless prompts only sound harmful."""


class AlignmentSettings(_Strict):
    """`[alignment]`: what did training change, and where?"""

    base: str = ""
    """The checkpoint before that training: a model of the same shape as the study's, or a PEFT adapter on it."""


class VerifySettings(_Strict):
    """`[verify]`: what a judge says of answers that are sampled while mediators are swapped."""

    judge: str = DEFAULT_JUDGE
    """A judge's spec (`judges.load_judge`)."""
    labelled: str = BUILTIN
    """Labelled answers that tell how the judge errs: the package's, or a CSV file (`judges.load_labelled`)."""
    samples: int = Field(default=8, ge=1)
    """Answers to every prompt."""
    tokens: int = Field(default=64, ge=1)
    """Tokens of each."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Of the sampling; 0 takes the likeliest token, so that one sample is enough."""
    held: bool = False
    """Hold what is swapped at the last prompt token at every new token, too."""
    sites: int = Field(default=3, ge=0)
    """So many of the strongest single sites, beside every set that the run found."""
    pairs: int = Field(default=24, ge=2)
    """At most so many held-out pairs."""


class DirectionSettings(_Strict):
    """`[directions]`: what is measured beside the direction that is found."""

    basis: str = ""
    """A safetensors or .npy file, such as another run's `direction.safetensors`: `[k, width]` of the stream."""
    bases: list[BasisKind] = []
    """Other bases at the same site: weights of a probe, top components of the differences, learnt by gradient."""
    rank: int = Field(default=1, ge=1)
    """Directions of each basis; a probe has one."""


class AblationSettings(_Strict):
    """`[ablation]`: what a judge says of answers while a direction is taken out of the stream, or added to it."""

    judge: str = DEFAULT_JUDGE
    """A judge's spec (`judges.load_judge`)."""
    labelled: str = BUILTIN
    """Labelled answers that tell how the judge errs: the package's, or a CSV file (`judges.load_labelled`)."""
    tokens: int = Field(default=32, ge=1)
    """Tokens of each greedy answer."""
    pairs: int = Field(default=48, ge=2)
    """At most so many held-out pairs."""


class StatisticsSettings(_Strict):
    """`[statistics]`: intervals and tests."""

    resamples: int = Field(default=9999, ge=100)
    """Bootstrap resamples and sign-flip permutations."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """False discovery rate at which a site counts as significant."""
    min_share: float = Field(default=0.05, ge=0, lt=1)
    """A unit counts as a mediator from this share of the total effect on, in NIE and in TIE."""


class StudyConfig(_Strict):
    """One study, as a TOML study file or as flags describe it."""

    model: Name
    """Hub id or local folder."""
    revision: Name = ""
    """Hub revision; empty for the default one."""
    pairs: Name = BUILTIN
    """`builtin`, or a JSONL or CSV file."""
    harmful: Name | None = None
    """A list of harmful prompts, such as AdvBench's, in place of `pairs`; goes with `harmless`."""
    harmless: Name | None = None
    """A list of harmless prompts, at least as many; twice as many give placebos."""
    harmful_column: str = ""
    """The column of the prompts in `harmful`; found by its name by default."""
    harmless_column: str = ""
    """The same of `harmless`."""
    align: Literal["edit", "end"] = "edit"
    """Prompts of a pair are one text but for an edit, or are compared from their ends only, as those of lists are."""
    max_pairs: int | None = Field(default=None, ge=2)
    """Use at most so many pairs, spread evenly over the file."""
    analyses: Distinct[str] = ["claims", "layers", "modules"]
    """Names of analyses (`analyses.EVERY`), or of those handed over from Python."""
    outcome: OutcomeName = "refusal"
    """What Y is."""
    backend: Literal["local", "ndif"] = "local"
    """Where the model runs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""
    device: str = "cpu"
    """Where a local model runs, as torch names it; `auto` shares it out over all GPUs."""
    seed: int = Field(default=0, ge=0)
    """Of the split, the bootstrap and the permutations."""
    out: Path | None = None
    """Run folder; `runs/<study>` by default."""
    job_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Aim for jobs of this length; by default 5 on this machine and 60 on a server."""
    max_memory: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most memory of this process in GB, kept by the size of batches; by default 1 GB beside libraries and weights."""
    load: LoadSettings = LoadSettings()
    prompt: PromptSettings = PromptSettings()
    refusal: RefusalSettings = RefusalSettings()
    response_logprob: ResponseSettings = ResponseSettings()
    logit_diff: LogitSettings = LogitSettings()
    positions: PositionSettings = PositionSettings()
    heads: HeadSettings = HeadSettings()
    neurons: NeuronSettings = NeuronSettings()
    intervene: InterveneSettings = InterveneSettings()
    attacks: AttackSettings = AttackSettings()
    monitor: MonitorSettings = MonitorSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    verify: VerifySettings = VerifySettings()
    directions: DirectionSettings = DirectionSettings()
    ablation: AblationSettings = AblationSettings()
    statistics: StatisticsSettings = StatisticsSettings()

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, data: Any) -> Any:
        """Settings as older study files and run folders name them."""
        if not isinstance(data, dict):
            return data
        return {RENAMED.get(key, key): value for key, value in data.items()}

    @model_validator(mode="after")
    def _outcome_has_its_strings(self) -> Self:
        if self.outcome == "logit_diff" and not (self.logit_diff.plus and self.logit_diff.minus):
            raise ValueError(
                "outcome logit_diff needs [logit_diff] with `plus` and `minus`, lists of one-token strings"
            )
        if "alignment" in self.analyses and not self.alignment.base:
            raise ValueError("the analysis alignment needs [alignment] with `base`, the checkpoint before the training")
        if self.directions.basis and "directions" not in self.analyses:
            raise ValueError("a basis is measured by the analysis directions; add it to `analyses`")
        if self.directions.bases and "directions" not in self.analyses:
            raise ValueError("bases are made and measured by the analysis directions; add it to `analyses`")
        if bool(self.refusal.compliant) != bool(self.refusal.refusing):
            raise ValueError("[refusal] needs both `compliant` and `refusing`, lists of openings, or neither")
        return self

    @model_validator(mode="after")
    def _loads_where_it_runs(self) -> Self:
        if self.load != LoadSettings() and self.backend == "ndif":
            raise ValueError("[load] says how this machine loads a model; a server loads its own, so take it away")
        if self.load.device_map and self.device != "cpu":
            raise ValueError(f"device is {self.device!r} and [load] has a device_map; give one of them")
        if self.load.quantization == "int8" and self.dtype != "float16":
            raise ValueError(f'int8 multiplies in float16 whatever else is {self.dtype}; give dtype = "float16"')
        return self

    @model_validator(mode="before")
    @classmethod
    def _ends_only(cls, data: Any) -> Any:
        """Prompts of lists have no edit, so that what is swapped by default is swapped behind the user's text."""
        if not isinstance(data, dict) or not (data.get("harmful") or data.get("align") == "end"):
            return data
        positions = data.get("positions", {})
        given = positions if isinstance(positions, dict) else positions.model_dump(exclude_unset=True)
        ends = {"layers": ["post_instruction", "last"], "modules": ["last"]}
        return {**data, "align": "end", "positions": {**ends, **given}}

    @model_validator(mode="after")
    def _lists_go_together(self) -> Self:
        if bool(self.harmful) != bool(self.harmless):
            raise ValueError("give both lists, `harmful` and `harmless`, or pairs")
        if self.harmful and self.pairs != BUILTIN:
            raise ValueError("give `pairs`, or the lists `harmful` and `harmless`, not both")
        return self

    @property
    def source(self) -> str:
        """Where its prompts come from, in words."""
        return f"{self.harmful} and {self.harmless}" if self.harmful else self.pairs

    @property
    def checkpoints(self) -> dict[str, list[str]]:
        """Other models that the analyses asked for run on, by the setting that names them."""
        named = {"attacks": ("attacks.checkpoints", self.attacks.checkpoints)}
        named["alignment"] = ("alignment.base", [self.alignment.base])
        return {setting: names for analysis, (setting, names) in named.items() if analysis in self.analyses}

    @property
    def seconds_per_job(self) -> float:
        """`job_seconds`, or the default of the backend."""
        return self.job_seconds or (60.0 if self.backend == "ndif" else 5.0)

    def identity(self) -> dict[str, Any]:
        """What makes this study this study: model, pairs and outcome. What is asked of it may change."""
        kept = {"model", "revision", "pairs", "max_pairs", "outcome", "dtype", "seed", "response_logprob", "logit_diff"}
        kept |= {"refusal"} if self.outcome == "refusal" else set()
        kept |= {"prompt"} if self.prompt != PromptSettings() else set()
        kept |= {"harmful", "harmless", "harmful_column", "harmless_column"} if self.harmful else set()
        kept |= {"align"} if self.align != "edit" else set()
        kept |= {"load"} if self.load != LoadSettings() else set()
        return self.model_dump(mode="json", include=kept)


def load_config(study: Path | None, overrides: dict[str, Any], assigned: Sequence[str] = ()) -> StudyConfig:
    """Settings of a study file with flags on top; flags alone where there is no file.

    assigned: more of them as `section.key=value`, which go over all others; a value that is not TOML is a string.

    Raises:
        SettingsError: unreadable file, unknown key or a value that is not allowed.
    """
    data = _read_toml(study) if study else {}
    for old in sorted(set(RENAMED) & set(data)):
        _log.warning("%s: the setting %r is now called %r; both are read", study, old, RENAMED[old])
    data = resolved(data, study.parent) if study else data
    data.update({key: value for key, value in overrides.items() if value is not None})
    for assignment in assigned:
        _assign(data, assignment)
    try:
        return StudyConfig(**resolved(data))
    except ValidationError as error:
        raise SettingsError(_one_line(error, study)) from error


def _assign(data: dict[str, Any], assignment: str) -> None:
    """Put `section.key=value` into settings.

    Raises:
        SettingsError: it is none.
    """
    name, given, value = assignment.partition("=")
    keys = name.strip().split(".")
    if not given or not all(keys):
        raise SettingsError(f"cannot read the setting {assignment!r}; write it as section.key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    for key in keys[:-1]:
        inner = data.get(key)
        data[key] = dict(inner) if isinstance(inner, dict) else {}
        data = data[key]
    data[keys[-1]] = parsed


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        encoding = _other_encoding(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"cannot read study file {str(path)!r}: {error}; give a TOML file") from error
    if encoding:
        raise SettingsError(
            f"study file {str(path)!r} is not UTF-8, it is probably {encoding}; save it as UTF-8, as "
            f"`iconv -f {encoding} -t UTF-8` does"
        )
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no TOML, a number of thousands of digits, brackets without end
        raise SettingsError(f"study file {str(path)!r} is not TOML: {error}") from error


def _other_encoding(raw: bytes) -> str:
    """The encoding of a text that is not UTF-8, as far as can be told, by iconv's name; empty where it is UTF-8."""
    found = next((name for mark, name in MARKS.items() if raw.startswith(mark)), "")
    if found.startswith(("utf-16", "utf-32")):
        return found.upper()
    if raw.count(0) > len(raw) // 4:
        return "UTF-16LE" if raw[1:2] == b"\0" else "UTF-16BE"
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "Windows-1252"
    return ""


def _one_line(error: ValidationError, study: Path | None) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "study"
    source = f"{study}: " if study else ""
    if first["type"] == "extra_forbidden":
        return f"{source}unknown setting {where!r}; `remote-mediation run --help` and the README list the settings"
    if first["type"] == "missing":
        return f"{source}setting {where!r} is missing; give it in the study file or as a flag"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
    return f"{source}{where}: {message}{value}"

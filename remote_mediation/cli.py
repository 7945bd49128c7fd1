"""The command line: parses, calls, prints. No logic, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from remote_mediation.errors import InputError, MediationError, PairsError
from remote_mediation.screen import Screen, json_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from remote_mediation.config import StudyConfig
    from remote_mediation.report import PairText
    from remote_mediation.result import Result
    from remote_mediation.store import Store
    from remote_mediation.tokens import Prepared, TokenPair

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Where inside a language model is harmful text decided? Causal mediation analysis, local or on NDIF.",
)
pairs_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at prompt pairs before running them.")
app.add_typer(pairs_app, name="pairs")
judge_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Measure who says which answers are harmful."
)
app.add_typer(judge_app, name="judge")
models_app = typer.Typer(rich_markup_mode="rich", help="Which models can be studied.")
app.add_typer(models_app, name="models")
# Pairs of a kind that `pairs check` shows.
_MOST_LINES = 1000


class Errors(Screen):
    """Standard error: a study does not end because nobody reads of its progress any more."""

    def on_broken_pipe(self) -> None:
        """Say nothing from here on."""
        self.quiet = True


class Warnings(logging.Handler):
    """What the package warns of, such as a damaged file by its name, on the same screen as all else."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one; a screen that is full ends no study."""
        with suppress(OSError):
            errors.print(Text(record.getMessage()), soft_wrap=True)


# Flags that are no settings of a study.
_NO_SETTINGS = ("study", "show_text", "settings", "as_json")
console = Screen()
errors = Errors(stderr=True)

StudyFile = Annotated[Path | None, typer.Argument(metavar="[STUDY.toml]", help="Study file; flags override it.")]
Model = Annotated[str | None, typer.Option(help="Hub id or local folder of the model.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the model.")]
Pairs = Annotated[
    str | None, typer.Option(help="'builtin', or a file of prompt pairs: JSON, JSONL, CSV, TSV, Parquet, '-'.")
]
PairsFile = Annotated[
    str, typer.Argument(metavar="FILE", help="'builtin', a file of pairs, '-', a study file, or a list of prompts.")
]
Harmless = Annotated[str | None, typer.Option(metavar="FILE", help="Harmless list to match a harmful FILE with.")]
Column = Annotated[str, typer.Option(help="Column of the prompts; found by its name by default.")]
MaxPairs = Annotated[int | None, typer.Option(help="Use at most so many pairs, spread over the file.")]
Kinds = Annotated[str | None, typer.Option(help="Comma-separated: claims, layers, modules, tokens, heads, neurons ...")]
OutcomeFlag = Annotated[str | None, typer.Option("--outcome", help="refusal, response_logprob or logit_diff.")]
BackendFlag = Annotated[str | None, typer.Option("--backend", help="local or ndif.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Where a local model runs: cpu, cuda, cuda:1, or auto for all GPUs.")]
MaxMemory = Annotated[float | None, typer.Option(help="Most memory in GB, kept by the size of batches.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the split, the bootstrap and the permutations.")]
Out = Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
BasisFlag = Annotated[
    str | None,
    typer.Option("--basis", metavar="FILE", help="A saved direction, measured beside the one that is found."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting; repeat it for more.")
]
ShowText = Annotated[bool, typer.Option("--show-text", help="Show generated answers in the report.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON (its form: reports/guide/json.md).")]


def main() -> None:
    """Entry point: errors made for users become one line and an exit code; bugs keep their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # of what the terminal's encoding lacks
    logging.getLogger(__package__).handlers[:] = [Warnings()]
    try:
        app()
    except MediationError as error:
        # Libraries quote whole tracebacks; what a user can act on stands in the first line.
        message = str(error).splitlines()[0] if isinstance(error, InputError) else str(error)
        _end(message, error.exit_code)
    except OSError as error:  # what the system refuses where nothing else was to be done about it
        place = f" ({error.filename})" if error.filename else ""
        _end(f"{error.strerror or error}{place}; see to the space, the permissions and the folders there", 2)


def _end(message: str, code: int) -> NoReturn:
    errors.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    sys.exit(code)


@app.command(
    epilog="Examples:\n\n"
    "  remote-mediation run study.toml\n\n"
    "  remote-mediation run --model HuggingFaceTB/SmolLM2-135M-Instruct --max-pairs 12 --analyses layers,modules\n\n"
    "  remote-mediation run study.toml --model meta-llama/Llama-3.1-70B-Instruct --backend ndif"
)
def run(
    study: StudyFile = None,
    model: Model = None,
    revision: Revision = None,
    pairs: Pairs = None,
    max_pairs: MaxPairs = None,
    analyses: Kinds = None,
    outcome: OutcomeFlag = None,
    backend: BackendFlag = None,
    dtype: Dtype = None,
    device: Device = None,
    max_memory: MaxMemory = None,
    basis: BasisFlag = None,
    seed: Seed = None,
    out: Out = None,
    settings: Settings = None,
    show_text: ShowText = False,
    as_json: AsJson = False,
) -> None:
    """Measure a study and write its report. The same command continues a run that was stopped."""
    config = _config(study, locals())
    from remote_mediation.door import study_name

    folder = config.out or Path("runs") / (study_name(study) if study else "study")
    _measure("run", config, folder, show_text, as_json)


@app.command(
    epilog="Examples:\n\n"
    "  remote-mediation extend runs/study detect,paths\n\n"
    "  remote-mediation extend runs/study intervene --set intervene.tokens=48\n\n"
    "  remote-mediation extend runs/study attacks --set attacks.checkpoints='[\"./my-lora\"]'\n\n"
    "  remote-mediation extend runs/study monitor --set monitor.hard_negatives=xstest_prompts.csv"
)
def extend(
    folder: RunFolder,
    analyses: Annotated[str, typer.Argument(metavar="ANALYSES", help="Comma-separated, such as detect,paths.")],
    settings: Settings = None,
    show_text: ShowText = False,
    as_json: AsJson = False,
) -> None:
    """Ask more of a run; what it has measured is kept, and analyses that these build on are added."""
    from remote_mediation.analyses import with_needed
    from remote_mediation.config import load_config
    from remote_mediation.store import Store

    known = Store.open(folder).config().model_dump(mode="json")
    asked = with_needed([*known["analyses"], *_names(analyses)])
    config = load_config(None, {**known, "analyses": asked}, settings or ())
    _measure("extend", config, folder, show_text, as_json)


@app.command(epilog="Example:\n\n  remote-mediation report runs/study --show-text")
def report(folder: RunFolder, show_text: ShowText = False, as_json: AsJson = False) -> None:
    """Rebuild CSV tables, figures and report from a run folder; no model is needed."""
    from remote_mediation.store import Store
    from remote_mediation.study import reread

    store = Store.open(folder)
    _write_report("report", store, reread(store), show_text, as_json)


@app.command("check-run", epilog="Example:\n\n  remote-mediation check-run runs/study")
def check_run_command(folder: RunFolder, as_json: AsJson = False) -> None:
    """Say which files of a run folder are whole; exit code 1 where one is not. What they hold is not changed."""
    from remote_mediation.checkup import check_run

    states = check_run(folder)
    told = [state for state in states if not (state.whole and state.detail == "whole")]
    lines = [f"{'note' if state.whole else 'FAIL'} {state.name}: {state.detail}" for state in told]
    whole = sum(state.whole for state in states)
    lines.append(f"{whole} of {len(states)} files are whole")
    _say("check-run", as_json, {"whole": whole == len(states), "files": states}, *lines)
    if whole < len(states):
        raise typer.Exit(1)


@app.command(
    "export",
    epilog="Examples:\n\n  remote-mediation export runs/study shared/study\n\n"
    "  remote-mediation export runs/study shared/study --replicate",
)
def export_command(
    folder: RunFolder,
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
    replicate: Annotated[
        bool, typer.Option("--replicate", help="Also what another needs to run it again, prompts among it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write what can be shared of a run: report, tables, figures and run.json, without prompts and answers."""
    from remote_mediation.export import export
    from remote_mediation.show.tables import count
    from remote_mediation.store import Store

    written = export(Store.open(folder), target, replicate=replicate)
    told = "; replicate/ has the prompts, some of them harmful" if replicate else ""
    _say("export", as_json, {"folder": target, "files": written}, f"{count(len(written), 'file')}: {target}{told}")


@app.command(epilog="Examples:\n\n  remote-mediation show runs/study\n\n  remote-mediation show runs/study claims")
def show(
    folder: RunFolder,
    section: Annotated[str | None, typer.Argument(help="A section of its report; all are listed without it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run's summary, or one section of its report; no model is needed."""
    from rich.markdown import Markdown

    from remote_mediation.report import section_named, sections
    from remote_mediation.store import Store
    from remote_mediation.study import reread
    from remote_mediation.terminal import overview, section_data, summary_data, terminal_summary

    store = Store.open(folder)
    result = reread(store)
    if section is not None:
        found = section_named(result, section)
        _say("show SECTION", as_json, section_data(found), Markdown(found.titled()))
        return
    path, parts = store.folder / "report.md", sections(result)
    summary = terminal_summary(result, path, parts)
    more = [overview(parts).rich("Sections")] if result.verdicts() else []
    _say("show", as_json, summary_data(result, path, parts), summary, *more)


@app.command(
    epilog="Examples:\n\n"
    "  remote-mediation plan study.toml\n\n"
    "  remote-mediation plan --model HuggingFaceTB/SmolLM2-135M-Instruct --analyses neurons"
)
def plan(
    study: StudyFile = None,
    model: Model = None,
    revision: Revision = None,
    pairs: Pairs = None,
    max_pairs: MaxPairs = None,
    analyses: Kinds = None,
    outcome: OutcomeFlag = None,
    backend: BackendFlag = None,
    dtype: Dtype = None,
    device: Device = None,
    max_memory: MaxMemory = None,
    basis: BasisFlag = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Say what a study would cost: rows, jobs, operations, memory and time. No weights are loaded."""
    config = _config(study, locals())
    from remote_mediation.cost import estimate

    _quiet_libraries()
    cost = estimate(config)
    table = Table(title=Text(f"{config.model}: {', '.join(config.analyses)}"), show_header=False)
    for name, value in cost.described():
        table.add_row(name, value)
    _say("plan", as_json, {"model": config.model, "analyses": config.analyses, **cost.as_data()}, table)


@pairs_app.command(
    epilog="Examples:\n\n"
    "  remote-mediation pairs check builtin --model HuggingFaceTB/SmolLM2-135M-Instruct\n\n"
    "  remote-mediation pairs check study.toml --show theft-01\n\n"
    "  remote-mediation pairs check advbench.csv --harmless instructions.json --model ./my-model"
)
def check(
    file: PairsFile,
    model: Annotated[str | None, typer.Option(help="Hub id or local folder whose tokenizer is used.")] = None,
    harmless: Harmless = None,
    harmful_column: Column = "",
    harmless_column: Column = "",
    show: Annotated[str | None, typer.Option(metavar="ID", help="Show a pair as the model gets it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise and align pairs: token counts, edits, what would be refused and why, and whether placebos are alike."""
    from remote_mediation.config import load_config
    from remote_mediation.models import load_tokenizer
    from remote_mediation.pairs import find_pair
    from remote_mediation.rendering import balanced, counts, refused_placebos, shown, warnings
    from remote_mediation.show.tables import count
    from remote_mediation.texts import described_lists, load_texts
    from remote_mediation.tokens import tokenise

    _quiet_libraries()
    study = Path(file) if file.endswith(".toml") else None
    sources = {} if study else _sources(file, harmless, harmful_column, harmless_column)
    config = load_config(study, {"model": model, **sources})
    texts, form = load_texts(config), config.prompt.form()
    tokenizer = load_tokenizer(config.model, config.revision)
    if show is not None:
        lines = shown(find_pair(texts, show), tokenizer, form)
        _say("pairs check --show", as_json, {"lines": lines}, *lines)
        return
    prepared = tokenise(texts, tokenizer, form)
    usable_ids = {pair.id for pair in prepared.pairs}
    placebos = refused_placebos([text for text in texts if text.id in usable_ids], tokenizer, form)
    notes = [*described_lists(config), *warnings(texts, tokenizer, form), *balanced(texts, tokenizer)]
    notes += placebos[:_MOST_LINES]
    data = {"usable": list(map(counts, prepared.pairs)), "refused": prepared.refusals, "notes": notes}
    told = f"{count(len(texts), 'pair')}: {_usable_in_words(prepared)}"
    table = _counts_table(prepared.pairs[:_MOST_LINES])
    _say("pairs check", as_json, data, table, *_refused_lines(prepared), *notes, told)


def _usable_in_words(prepared: Prepared) -> str:
    equal = sum(len(pair.x0) == len(pair.x1) for pair in prepared.pairs)
    return f"{len(prepared.pairs)} usable ({equal} of equal length), {len(prepared.refusals)} refused"


def _refused_lines(prepared: Prepared) -> list[str]:
    """The first refused pairs with their reasons, and that there are more where there are."""
    from remote_mediation.rendering import printable

    lines = [f"refused {printable(one.id)}: {one.reason}" for one in prepared.refusals[:_MOST_LINES]]
    if max(map(len, prepared)) > _MOST_LINES:
        lines.append(f"of usable and of refused pairs the first {_MOST_LINES:,} are shown; --show ID shows any")
    return lines


def _counts_table(pairs: Sequence[TokenPair]) -> Table:
    """Where the tokens of pairs lie."""
    from remote_mediation.rendering import counts, printable

    table = Table("pair", "cluster", "tokens x0", "tokens x1", "edit from", "after edit", "template after")
    for pair in pairs:
        name, cluster, *numbers = map(str, counts(pair).values())
        table.add_row(*(Text(printable(one), overflow="fold") for one in (name, cluster)), *numbers)
    return table


@pairs_app.command(
    epilog="Examples:\n\n"
    "  remote-mediation pairs convert spreadsheet.tsv pairs.jsonl\n\n"
    "  remote-mediation pairs convert harmbench.csv pairs.jsonl --harmless instructions.json"
)
def convert(
    file: PairsFile,
    target: Annotated[Path, typer.Argument(metavar="PAIRS.jsonl", help="File to write; it must not exist.")],
    harmless: Harmless = None,
    harmful_column: Column = "",
    harmless_column: Column = "",
    as_json: AsJson = False,
) -> None:
    """Write pairs, or two lists matched into pairs, as JSON lines."""
    from remote_mediation.config import load_config
    from remote_mediation.show.tables import count
    from remote_mediation.texts import load_texts, write_texts

    sources = _sources(file, harmless, harmful_column, harmless_column)
    texts = load_texts(load_config(None, {"model": "", **sources}))
    write_texts(texts, target)
    _say("pairs convert", as_json, {"pairs": len(texts), "file": target}, f"{count(len(texts), 'pair')}: {target}")


def _sources(file: str, harmless: str | None, harmful_column: str, harmless_column: str) -> dict[str, str]:
    """Settings that name a file of pairs, or two lists."""
    if harmless is None:
        return {"pairs": file}
    columns = {"harmful_column": harmful_column, "harmless_column": harmless_column}
    return {"harmful": file, "harmless": harmless, **columns}


@app.command(
    epilog="Examples:\n\n  remote-mediation selfcheck\n\n  remote-mediation selfcheck --case late-head --seed 7\n\n"
    "  remote-mediation selfcheck --all\n\n  remote-mediation selfcheck --published"
)
def selfcheck(
    case: Annotated[
        list[str] | None, typer.Option(help="What is planted; again for another. The plain gate if none.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All cases, one after the other; some minutes.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Which model of the case to build.")] = 1,
    published: Annotated[
        bool, typer.Option("--published", help="Numbers published of real models, of those that can be had.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline on models whose mechanism was planted; exit code 1 unless all that it says of them is true."""
    if published:
        _check_published(as_json)
        return
    from remote_mediation.planted.cases import CASES
    from remote_mediation.planted.selfcheck import PLAIN, run_selfcheck
    from remote_mediation.progress import reporter

    names = list(CASES) if every else case or [PLAIN]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise InputError(f"no case is called {unknown[0]!r}; there are {', '.join(CASES)}")
    results = []
    for name in names:
        with reporter(errors) as watch:
            results.append(run_selfcheck(name, seed, watch))
        if not as_json:
            console.print(results[-1].line(), soft_wrap=True, highlight=False)  # some cases take minutes
    passed = all(result.passed for result in results)
    tables = [result.table() for result in results if len(results) == 1 or not result.passed]
    _say("selfcheck", as_json, {"passed": passed, "cases": results}, *tables)
    if not passed:
        raise typer.Exit(1)


def _check_published(as_json: bool) -> None:
    """Compare numbers that were published of real models with ours; exit code 1 where one is off."""
    from remote_mediation.planted.published import check_published, published_studies
    from remote_mediation.progress import reporter

    _quiet_libraries()
    checked = []
    for folder in published_studies():
        with reporter(errors) as watch:
            checked.append(check_published(folder, watch))
        for line in [] if as_json else checked[-1].lines():
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    passed = all(one.passed for one in checked)
    _say(
        "selfcheck --published",
        as_json,
        {"passed": passed, "studies": [one.as_data() for one in checked]},
    )
    if not passed:
        raise typer.Exit(1)


@app.command("fetch-model", epilog="Example:\n\n  remote-mediation fetch-model qwen2.5-coder-0.5b")
def fetch_model_command(
    name: Annotated[str | None, typer.Argument(help="Its short name, from --list.")] = None,
    list_models: Annotated[bool, typer.Option("--list", help="Show the models, sizes and licences.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a small real model into the user's cache and print its folder."""
    from remote_mediation.fetch import fetch_model, fetchable_data, fetchable_table

    if list_models:
        _say("fetch-model --list", as_json, {"models": fetchable_data()}, fetchable_table())
        return
    if name is None:
        raise InputError("name a model to fetch; fetch-model --list shows them")
    _quiet_libraries()
    folder = fetch_model(name, errors)
    _say("fetch-model", as_json, {"folder": folder}, str(folder))


@models_app.callback(
    invoke_without_command=True,
    epilog="Examples:\n\n"
    "  remote-mediation models\n\n"
    "  remote-mediation models check meta-llama/Llama-3.1-405B-Instruct",
)
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the model families: what each component is there, and why some families cannot be studied."""
    if context.invoked_subcommand is not None:
        return
    from remote_mediation.engine.coverage import family_lines

    families = family_lines()
    lines: list[Text] = []
    for family in families:
        why = f": cannot be studied: {family.reason}" if family.reason else ""
        lines.append(Text.assemble((family.family, "bold"), why))
        lines += [Text(f"  {name:<20} {words}") for name, words in family.components.items()]
    _say("models", as_json, {"families": families}, *lines)


@models_app.command("check", epilog="Example:\n\n  remote-mediation models check ./my-model")
def models_check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or local folder; only its configuration is read.")
    ],
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a model can be studied, from its configuration alone; exit code 1 where it cannot."""
    from remote_mediation.engine.coverage import check_model

    _quiet_libraries()
    found = check_model(model, revision or "")
    _say("models check", as_json, found, *found.lines())
    if not found.covered:
        raise typer.Exit(1)


@app.command(epilog="Example:\n\n  remote-mediation status")
def status(as_json: AsJson = False) -> None:
    """Say which models the NDIF server has: hot, warm, deploying or cold."""
    from remote_mediation.engine.server import deployments, server_from_environment

    server = server_from_environment()
    found = deployments(server)
    table = Table("model", "revision", "task", "state", "replicas", title=Text(server.host))
    for one in found:
        table.add_row(Text(one.repo_id), one.revision, one.task, one.state, str(one.replicas))
    _say("status", as_json, {"host": server.host, "deployments": found}, table)


@app.command(
    epilog="Examples:\n\n"
    "  remote-mediation doctor\n\n"
    "  remote-mediation doctor --model meta-llama/Llama-3.1-70B-Instruct"
)
def doctor(model: Model = None, revision: Revision = None, as_json: AsJson = False) -> None:
    """Check versions, key, server and disk for remote studies, and whether a model fits this machine, and how.

    Exit code 1 when something would fail on the server.
    """
    from remote_mediation.engine.fit import fits
    from remote_mediation.engine.server import examine, server_from_environment

    findings = examine(server_from_environment(), model, revision or "")
    findings += [fits(model, revision or "")] if model else []
    marks = {True: ("ok  ", "green"), False: ("FAIL", "red")}
    lines = [Text.assemble(marks[finding.good], f" {finding.name}: {finding.detail}") for finding in findings]
    good = all(finding.good for finding in findings)
    _say("doctor", as_json, {"good": good, "findings": findings}, *lines)
    if not good:
        raise typer.Exit(1)


@judge_app.command(
    "check",
    epilog="Examples:\n\n"
    "  remote-mediation judge check --all\n\n"
    "  remote-mediation judge check labelled.csv --judge classifier:./my-classifier:unsafe\n\n"
    "  remote-mediation judge check labelled.csv --judge python:my_package.judges:by_keyword",
)
def judge_check(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="'builtin', or a CSV file with prompt, answer and harmful (1 or 0).")
    ] = "builtin",
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="refusal-openings, refusal-phrases, embedding[:FOLDER], openings+embedding[:FOLDER], model:NAME, "
            "classifier:MODEL_OR_FOLDER[:LABEL] or python:package.module:function; repeat it to compare."
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All that are ready as they are (after fetch-model minilm).")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare judges' verdicts with labels: accuracy, recall, specificity and Cohen's kappa, with 95% intervals."""
    import numpy as np

    from remote_mediation.judges import (
        BUILTIN,
        DEFAULT_JUDGE,
        MEANING,
        STANDING,
        check_judge,
        load_judge,
        load_labelled,
    )
    from remote_mediation.report import judge_table
    from remote_mediation.show.tables import count

    records = load_labelled(file)
    specs = list(dict.fromkeys([*(STANDING if every else ()), *(judge or ())])) or [DEFAULT_JUDGE]
    if any(spec.startswith(("classifier", "embedding", "openings+", "model")) for spec in specs):
        _quiet_libraries()
    qualities = [check_judge(load_judge(spec), records, np.random.default_rng(seed)) for spec in specs]
    harmful = sum(record.harmful for record in records)
    of = f"{file}: {count(len(records), 'answer')}, {harmful} of them labelled harmful"
    notes = [f"{MEANING}. Brackets: 95% intervals."]
    if file == BUILTIN:
        notes.append("The built-in answers are harmless stand-ins, many of them hard: no sample of a model's answers.")
    _say("judge check", as_json, {"file": file, "judges": qualities}, judge_table(qualities).rich(of), *notes)


@app.command(
    epilog="Examples:\n\n"
    "  remote-mediation compare runs/base runs/tuned\n\n"
    "  remote-mediation compare runs/1b runs/8b runs/70b --out comparison"
)
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Two run folders or more.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write report.md, tables and a figure.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs of several models or checkpoints side by side; it takes what `export` wrote of them, too."""
    from remote_mediation.compare import comparison_data, read_runs, runs_table, verdicts_table, write_comparison
    from remote_mediation.show.tables import count

    runs = read_runs(folders)
    written = write_comparison(runs, out) if out else None
    title = f"{count(len(runs), 'run')} compared"
    tables = [runs_table(runs).rich(title), verdicts_table(runs).rich("Claims and rivals")]
    lines = [f"Comparison: {written}"] if written else []
    _say("compare", as_json, {**comparison_data(runs), "report": written}, *tables, *lines)


@app.command(
    epilog="Examples:\n\n"
    "  remote-mediation view runs/study\n\n"
    "  remote-mediation view runs/base runs/tuned --out page.html"
)
def view(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; RUN/view.html by default.")] = None,
    show_text: Annotated[bool, typer.Option("--show-text", help="Show each pair's tokens below the maps.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Show the page on this machine alone, until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where it is served; 0 takes a free one.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a page to explore: claims with their numbers, maps by pair, sizes of sets, runs side by side."""
    from remote_mediation.show.page import write_page
    from remote_mediation.show.serve import served

    if show_text:
        _quiet_libraries()
    written = write_page(folders, out, show_text)
    if not serve:
        _say("view", as_json, {"page": written, "address": None}, f"Page: {written}")
        return
    with served(written.read_bytes(), port) as server, suppress(KeyboardInterrupt):
        shown = f"Showing it on {server.address} (Ctrl-C ends that)"
        _say("view", as_json, {"page": written, "address": server.address}, f"Page: {written}", shown)
        server.serve_forever()


def _measure(command: str, config: StudyConfig, folder: Path, show_text: bool, as_json: bool) -> None:
    """Run a study in its folder and write the report; Ctrl-C leaves what is finished."""
    from remote_mediation.contents import look_at
    from remote_mediation.store import Store

    look_at(config)  # a bad file is refused before a model is loaded
    store = Store.create(folder, config.identity())
    from remote_mediation.door import open_lab
    from remote_mediation.progress import reporter

    _quiet_libraries()
    try:
        with reporter(errors) as watch, open_lab(config, out=folder, watch=watch, note=watch.note) as lab:
            result = lab.run()
    except KeyboardInterrupt:
        note = "stopped; everything finished so far is kept, and the same command goes on from there"
        errors.print(note, soft_wrap=True)
        raise typer.Exit(130) from None
    _write_report(command, store, result, show_text, as_json)


def _config(study: Path | None, flags: dict[str, Any]) -> StudyConfig:
    from remote_mediation.config import load_config

    overrides = {name: value for name, value in flags.items() if name not in _NO_SETTINGS}
    if overrides["analyses"] is not None:
        overrides["analyses"] = _names(overrides["analyses"])
    if overrides["basis"] is not None:
        overrides["directions"] = {"basis": overrides["basis"]}
    del overrides["basis"]
    return load_config(study, overrides, flags["settings"] or ())


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _quiet_libraries() -> None:
    """Keep the libraries' own progress bars and retries out of ours."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def _write_report(command: str, store: Any, result: Any, show_text: bool, as_json: bool) -> None:
    from remote_mediation.report import sections, write_report
    from remote_mediation.terminal import summary_data, terminal_summary

    parts = sections(result)
    path = write_report(store, result, _texts(store, result) if show_text else (), parts=parts)
    _say(command, as_json, summary_data(result, path, parts), terminal_summary(result, path, parts))


def _say(command: str, as_json: bool, data: Any, *shown: RenderableType) -> None:
    """Print a result as people read it, texts as they are and on lines of their own, or as data (`forms`)."""
    if as_json:
        from remote_mediation.forms import formed

        typer.echo(json_text(formed(command, data)))
        return
    for part in shown:
        whole = isinstance(part, str | Text)
        console.print(part, highlight=False, markup=False, soft_wrap=whole)


def _texts(store: Store, result: Result) -> list[PairText]:
    """Prompts and answers of a study's pairs; the answers take the model's tokenizer, not its weights.

    Raises:
        PairsError: the pairs are no longer those that were measured.
    """
    from remote_mediation.models import load_tokenizer
    from remote_mediation.report import PairText
    from remote_mediation.study import texts_digest
    from remote_mediation.texts import load_texts

    study = result.study
    now = texts_digest(study.config)
    if store.record().get("texts", now) != now:
        raise PairsError(
            f"{study.config.source} has changed since it was measured; put it back, or leave out --show-text"
        )
    texts = {text.id: text for text in load_texts(study.config)}
    tokenizer = load_tokenizer(study.info.name, study.info.revision)
    return [
        PairText(pair.id, texts[pair.id].harmful, texts[pair.id].harmless, *map(tokenizer.decode, pair.answers))
        for pair in study.pairs
    ]

"""Settings: what a study file and flags may say, and what is refused in which words."""

from pathlib import Path
from typing import Any

import pytest

from remote_mediation.config import StudyConfig, load_config
from remote_mediation.errors import SettingsError


def study(folder: Path, content: str) -> Path:
    file = folder / "study.toml"
    file.write_text(content, "utf-8")
    return file


def test_a_model_is_all_a_study_needs() -> None:
    config = load_config(None, {"model": "m"})
    assert config.analyses == ["claims", "layers", "modules"]
    assert (config.pairs, config.outcome, config.backend, config.dtype) == (
        "builtin",
        "refusal",
        "local",
        "float32",
    )


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    file = study(tmp_path, 'model = "m"\nseed = 3\nanalyses = ["heads"]\n[neurons]\nmax_windows = 7\n')
    config = load_config(file, {"seed": 5, "model": None, "max_pairs": 4})
    assert (config.model, config.seed, config.max_pairs, config.analyses) == ("m", 5, 4, ["heads"])
    assert config.neurons.max_windows == 7


def test_pairs_are_named_from_where_the_name_stands(tmp_path: Path) -> None:
    file = study(tmp_path, 'model = "m"\npairs = "mine.jsonl"\n')
    assert load_config(file, {}).pairs == str(tmp_path / "mine.jsonl")
    assert load_config(file, {"pairs": "other.jsonl"}).pairs == "other.jsonl"
    assert load_config(study(tmp_path, 'model = "m"\npairs = "/abs/mine.jsonl"\n'), {}).pairs == "/abs/mine.jsonl"
    assert load_config(study(tmp_path, 'model = "m"\npairs = "builtin"\n'), {}).pairs == "builtin"
    assert load_config(study(tmp_path, 'model = "m"\n'), {}).pairs == "builtin"


def test_every_path_is_resolved_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "studies"
    for name in ("models/tiny", "tuned", "judge"):
        (folder / name).mkdir(parents=True)
    (folder / "hard.csv").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/pairs.csv").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    content = (
        'model = "models/tiny"\npairs = "~/pairs.csv"\n[monitor]\nhard_negatives = "hard.csv"\n'
        '[attacks]\ncheckpoints = ["tuned", "org/name"]\n[intervene]\njudge = "classifier:judge:HARMFUL"\n'
    )
    config = load_config(study(folder, "\ufeff" + content), {})
    assert config.model == str(folder / "models/tiny")
    assert config.pairs == str(tmp_path / "home/pairs.csv")
    assert config.monitor.hard_negatives == str(folder / "hard.csv")
    assert config.attacks.checkpoints == [str(folder / "tuned"), "org/name"]
    assert config.intervene.judge == f"classifier:{folder}/judge:HARMFUL"
    assert load_config(study(folder, content), {"model": "~/m", "pairs": "./x.csv"}).model == str(tmp_path / "home/m")
    assert load_config(study(folder, content), {"pairs": "./x.csv"}).pairs == "./x.csv"


def test_names_stay_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders hold them: the same command goes on in the same folder."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(Path(study(tmp_path, 'model = "./models"\npairs = "./a.csv"\n').name), {})
    assert (config.model, config.pairs) == ("./models", "./a.csv")
    assert load_config(study(tmp_path, 'model = "./models"\n'), {}).model == "./models"


def test_what_is_named_twice_counts_once() -> None:
    config = StudyConfig(
        model="m",
        analyses=["heads", "layers", "heads"],
        positions={"heads": ["last", "last"]},
        neurons={"layers": [2, 1, 2], "search": ["windows", "all", "windows"]},
    )
    assert config.analyses == ["heads", "layers"]
    assert config.positions.heads == ["last"]
    assert config.neurons.layers == [2, 1]
    assert config.neurons.search == ["windows", "all"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"setting 'model' is missing; give it in the study file or as a flag"),
        ('model = "m"\nmodle = 1', r"unknown setting 'modle'; `remote-mediation run --help`"),
        ('model = "m"\n[neurons]\nwidth = 1', r"unknown setting 'neurons.width'"),
        ('model = "m"\n[nerons]\nexact = 1', r"unknown setting 'nerons'"),
        ('model = "m"\nanalyses = "layers"', r"analyses: .*list \(got 'layers'\)"),
        ('model = "m"\nanalyses = []', r"analyses: .*at least 1 item"),
        ('model = "m"\noutcome = "logits"', r"outcome: .*'response_logprob' or 'logit_diff' \(got 'logits'\)"),
        (
            'model = "m"\noutcome = "logit_diff"',
            r"study: outcome logit_diff needs \[logit_diff\] with `plus` and `minus`",
        ),
        ('model = "m"\noutcome = "logit_diff"\n[logit_diff]\nplus = ["a"]', r"needs \[logit_diff\] with `plus` and"),
        ('model = "m"\nbackend = "cloud"', r"backend: .*'local' or 'ndif' \(got 'cloud'\)"),
        ('model = "m"\nseed = -1', r"seed: .*greater than or equal to 0 \(got -1\)"),
        ('model = "m"\nmax_pairs = 1', r"max_pairs: .*greater than or equal to 2 \(got 1\)"),
        ('model = "m"\npairs = 5', r"pairs: .*string \(got 5\)"),
        ('model = "m"\n[positions]\nheads = []', r"positions.heads: .*at least 1 item"),
        ('model = "m"\n[neurons]\nlayers = []', r"neurons.layers: .*at least 1 item"),
        ('model = "m"\n[neurons]\nwindow = 4', r"unknown setting 'neurons.window'"),
        ('model = "m"\n[neurons]\nsearch = []', r"neurons.search: .*at least 1 item"),
        (
            'model = "m"\n[neurons]\nsearch = ["gradients"]',
            r"neurons.search.0: .*'gradient', 'windows' or 'all' \(got 'gradients'\)",
        ),
        ('model = "m"\n[neurons]\nsearch = "all"', r"neurons.search: .*list \(got 'all'\)"),
        ('model = "m"\n[neurons]\nexact = 0', r"neurons.exact: .*greater than or equal to 1 \(got 0\)"),
        ('model = "m"\n[neurons]\nmax_windows = 0', r"neurons.max_windows: .*greater than or equal to 1 \(got 0\)"),
        ('model = "m"\n[neurons]\ncarry = 1', r"neurons.carry: .*less than 1 \(got 1\)"),
        ('model = "m"\n[neurons]\ncarry = 0', r"neurons.carry: .*greater than 0 \(got 0\)"),
        ('model = "m"\n[neurons]\nrandom_sets = 0', r"neurons.random_sets: .*greater than or equal to 1 \(got 0\)"),
        ('model = "m"\n[statistics]\nalpha = 0.5', r"statistics.alpha: .*less than 0.5 \(got 0.5\)"),
        ("model = ", r"is not TOML: "),
        ("seed = " + "1" * 5000, r"is not TOML: Exceeds the limit"),
        ("pairs = " + "[" * 5000, r"is not TOML: maximum recursion depth exceeded"),
    ],
)
def test_refused(tmp_path: Path, content: str, message: str) -> None:
    file = study(tmp_path, content)
    with pytest.raises(SettingsError, match=message) as raised:
        load_config(file, {})
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", ["false", "False", " TRUE "])
def test_a_truth_value_in_quotes_is_no_argument_of_a_template(tmp_path: Path, value: str) -> None:
    """Templates take any text for true, so that a model was told to think where the study says that it is not."""
    means = value.strip().lower()
    file = study(tmp_path, f'model = "m"\n[prompt]\ntemplate_arguments = {{ enable_thinking = "{value}" }}\n')
    with pytest.raises(SettingsError, match=f"take any text for true; write enable_thinking = {means}, without quotes"):
        load_config(file, {})
    with pytest.raises(SettingsError, match=f"write enable_thinking = {means}"):
        load_config(None, {"model": "m"}, [f'prompt.template_arguments.enable_thinking="{value}"'])


def test_a_truth_value_as_python_writes_it_is_no_argument_of_a_template() -> None:
    """`--set` makes a text of what TOML does not know."""
    with pytest.raises(SettingsError, match="write enable_thinking = false, without quotes"):
        load_config(None, {"model": "m"}, ["prompt.template_arguments.enable_thinking=False"])
    kept = load_config(None, {"model": "m"}, ["prompt.template_arguments.enable_thinking=false"])
    assert kept.prompt.template_arguments == {"enable_thinking": False}


@pytest.mark.parametrize(
    "setting",
    [
        "intervene.factors=[nan]",
        "intervene.factors=[inf]",
        "verify.temperature=inf",
        "max_memory=inf",
        "max_memory=nan",
        "job_seconds=inf",
    ],
)
def test_numbers_of_a_study_are_finite(setting: str) -> None:
    with pytest.raises(SettingsError, match="finite number"):
        load_config(None, {"model": "m"}, [setting])


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_unreadable_study_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot read study file .*; give a TOML file"):
        load_config(tmp_path / name, {})


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
        ("latin-1", "Windows-1252"),
    ],
)
def test_a_study_file_that_is_not_utf_8_says_how_to_convert_it(tmp_path: Path, encoding: str, told: str) -> None:
    file = tmp_path / "study.toml"
    file.write_bytes('model = "a/model"  # é\n'.encode(encoding))
    with pytest.raises(SettingsError, match=r"study\.toml' is not UTF-8, it is probably ") as raised:
        load_config(file, {})
    assert str(raised.value).endswith(f"probably {told}; save it as UTF-8, as `iconv -f {told} -t UTF-8` does")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'model = "a\0b"'])
def test_a_study_file_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"study\.toml' is not (UTF-8|TOML)"):
        load_config(tmp_path / "study.toml", {})


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"backend": "ndif"}, True),
        ({"device": "cuda"}, True),
        ({"out": "elsewhere"}, True),
        ({"job_seconds": 1.0}, True),
        ({"max_memory": 2.0}, True),
        ({"model": "other"}, False),
        ({"revision": "r"}, False),
        ({"pairs": "mine.jsonl"}, False),
        ({"max_pairs": 4}, False),
        ({"harmful": "a.csv", "harmless": "b.csv"}, False),
        ({"harmful": "a.csv", "harmless": "b.csv", "harmful_column": "x", "harmless_column": "y"}, False),
        ({"align": "end"}, False),
        ({"analyses": ["heads"]}, True),
        ({"outcome": "logit_diff", "logit_diff": {"plus": ["a"], "minus": ["b"]}}, False),
        ({"logit_diff": {"plus": ["a"], "minus": ["b"]}}, False),
        ({"dtype": "float16"}, False),
        ({"seed": 1}, False),
        ({"prompt": {"system": "Be brief."}}, False),
        ({"refusal": {"openings": "builtin"}}, False),
        ({"response_logprob": {"tokens": 3}}, False),
        ({"positions": {"heads": ["all"]}}, True),
        ({"heads": {"components": ["key_heads"]}}, True),
        ({"neurons": {"search": ["all"]}}, True),
        ({"intervene": {"tokens": 3}}, True),
        ({"attacks": {"checkpoints": ["other"]}}, True),
        ({"monitor": {"hard_negatives": "hard.csv"}}, True),
        ({"alignment": {"base": "other"}}, True),
        ({"verify": {"samples": 4}}, True),
        ({"ablation": {"tokens": 4}}, True),
        ({"directions": {"basis": "saved.npy"}, "analyses": ["directions"]}, True),
        ({"statistics": {"resamples": 100}}, True),
        ({"load": {"quantization": "nf4"}}, False),
        ({"load": {"attention": "eager"}}, False),
    ],
)
def test_what_makes_a_study_another(changes: dict[str, Any], same: bool) -> None:
    plain, changed = StudyConfig(model="m"), StudyConfig(**{"model": "m", **changes})
    assert changed != plain
    assert (changed.identity() == plain.identity()) is same


def test_every_setting_is_judged_above() -> None:
    judged = {name for case in test_what_makes_a_study_another.pytestmark[0].args[1] for name in case[0]}
    assert judged == set(StudyConfig.model_fields)


def test_job_seconds_default_to_the_backend() -> None:
    assert StudyConfig(model="m").seconds_per_job == 5
    assert StudyConfig(model="m", backend="ndif").seconds_per_job == 60
    assert StudyConfig(model="m", backend="ndif", job_seconds=2).seconds_per_job == 2


def test_reads_the_old_name_of_analyses_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = study(tmp_path, 'model = "m"\ngranularity = ["heads"]\n')
    assert load_config(file, {}).analyses == ["heads"]
    assert "'granularity' is now called 'analyses'" in caplog.text

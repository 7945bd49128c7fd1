"""The page of a run, read back: the numbers of its tables, text only where it was asked for, and nothing but data."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from fakes import CannedBackend, Watcher, records, token_pair, words_tokenizer, write_pairs

from remote_mediation import cli
from remote_mediation.analyses.claims.ask import CLAIM_COLUMNS, SET_COLUMNS
from remote_mediation.analyses.claims.sparse import GATE_SET_COLUMNS
from remote_mediation.config import StudyConfig
from remote_mediation.errors import SettingsError, StoreError
from remote_mediation.printed import tokens_at, visible
from remote_mediation.report import csv_tables
from remote_mediation.show import maps, views
from remote_mediation.show.page import write_page
from remote_mediation.show.serve import PageServer, served
from remote_mediation.store import Store
from remote_mediation.study import run_study

HOSTILE = "</script><img src=x onerror=document.title='owned'>"
"""An id that would end its script, and run, where it was taken for markup."""
POINT_AT_A_CELL = """setTimeout(() => {
  const choice = document.querySelector("select");
  choice.selectedIndex = 3;
  choice.dispatchEvent(new Event("change"));
  setTimeout(() => {
    const cell = document.querySelectorAll("svg .mark-rect path")[7];
    const box = cell.getBoundingClientRect();
    const at = {bubbles: true, clientX: box.left + 3, clientY: box.top + 3, view: window};
    for (const name of ["pointerover", "pointermove"]) cell.dispatchEvent(new PointerEvent(name, at));
    for (const name of ["mouseover", "mousemove"]) cell.dispatchEvent(new MouseEvent(name, at));
  }, 1000);
}, 3000);"""
"""Chooses the third pair of the first map, and moves over one of its cells."""
LIMIT = 5_000_000
SETS = (
    {"number": 1, "measure": "direct effect", "direction": "nie", "decides": True, "harm": 0.9, "common": 0.25},
    {"number": 1, "measure": "direct effect", "direction": "tie", "decides": False, "harm": np.nan, "common": np.nan},
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that others are copies of."""
    return measure(tmp_path_factory.mktemp("view"), "steal-car")


@pytest.fixture
def make(tmp_path: Path, measured: Path) -> Callable[..., Path]:
    """A finished run folder with maps and, from outside, tables of claims."""

    def run(name: str = "run", claims: bool = True) -> Path:
        folder = Path(shutil.copytree(measured, tmp_path / name))
        if claims:
            add_claims(folder)
        return folder

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, measured: Path) -> Path:
    """A run folder with all tables, and its page."""
    folder = Path(shutil.copytree(measured, tmp_path_factory.mktemp("whole") / "run"))
    add_claims(folder)
    write_page([folder])
    return folder


def measure(folder: Path, first: str) -> Path:
    """A finished run folder with maps. first: the id of its first pair."""
    pairs = records()
    pairs[0]["id"] = first
    config = StudyConfig(
        model="tiny",
        pairs=str(write_pairs(folder / "pairs.jsonl", pairs)),
        analyses=["layers", "modules", "tokens", "heads"],
        outcome="logit_diff",
        logit_diff={"plus": ["sure"], "minus": ["no"]},
        statistics={"resamples": 100},
    )
    store = Store.create(folder / "run", config.identity())
    result = run_study(config, CannedBackend({}), store, Watcher())
    for name, table in csv_tables(result).items():  # as the report writes them
        store.write(name, table.to_csv(index=False))
    return store.folder


def add_claims(folder: Path) -> None:
    sets = pd.DataFrame(SETS, columns=list(SET_COLUMNS)).assign(of="TE", n=16, clusters=16, excess=-0.2)
    for side in ("harm", "common", "excess"):
        sets[[f"{side}_low", f"{side}_high"]] = np.array([sets[side] - 0.1, sets[side] + 0.1]).T
    claim = {"number": 1, "claim": "decided <b>late</b>", "said": "supported", "why": "NIE above 2/3"}
    curve = [
        {"size": size, "part": size / 64, "nie": size / 64, "nie_low": 0.0, "nie_high": 1.0, "chosen": size == 8}
        for size in (1, 8, 64)
    ]
    written = {
        "sets.csv": sets,
        "claims.csv": pd.DataFrame([claim], columns=list(CLAIM_COLUMNS)),
        "gate_sets.csv": pd.DataFrame(curve, columns=list(GATE_SET_COLUMNS)),
    }
    for name, table in written.items():
        table.to_csv(folder / name, index=False)


class Page(HTMLParser):
    """What a browser would see: elements, text outside scripts, and the charts' specifications."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.text = ""
        self._within = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._within = "json" if ("type", "application/json") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "json":
            self.charts.append(json.loads(data))
        elif self._within not in ("script", "style"):
            self.text += data

    def chart(self, start: str) -> dict[str, Any]:
        """The one chart whose description starts so."""
        (chart,) = [chart for chart in self.charts if chart["description"].startswith(start)]
        return chart

    def map(self, analysis: str) -> pd.DataFrame:
        """The data of an analysis's map."""
        (data,) = self.chart(views._TITLES[analysis])["datasets"].values()
        return pd.read_csv(io.StringIO(data))

    def choice(self, analysis: str) -> dict[str, Any]:
        """The choice of a pair in an analysis's map."""
        (bind,) = [param["bind"] for param in self.chart(views._TITLES[analysis])["params"] if "bind" in param]
        return bind

    def rows(self, start: str) -> list[dict[str, Any]]:
        """All data of a chart, set by set."""
        return [row for rows in self.chart(start)["datasets"].values() for row in rows]


def read(path: Path) -> Page:
    return Page(path.read_text("utf-8"))


def test_cells_of_the_mean_are_those_of_the_summary(whole: Path) -> None:
    shown = read(whole / "view.html").map("layers")
    shown = shown[shown["pair"] == 0].set_index(["x", "layer"])
    summary = pd.read_csv(whole / "summary.csv")
    summary = summary[(summary["analysis"] == "layers") & (summary["split"] == "all")]
    for quantity in ("nie", "tie"):
        of = summary[summary["quantity"] == quantity].set_index(["position", "layer"]).loc[shown.index]
        for column, name in {"mean": "", "ci_low": "_low", "ci_high": "_high", "q": "_q"}.items():
            np.testing.assert_allclose(shown[f"{quantity}{name}"], of[column], rtol=1e-5)
        assert (shown["n"] == of["n"]).all()


def test_cells_of_a_pair_are_those_of_the_effects(whole: Path) -> None:
    page, effects = read(whole / "view.html"), pd.read_csv(whole / "effects.csv")
    choice = page.choice("modules")
    assert choice["options"] == list(range(7))
    names = dict(zip(choice["options"], choice["labels"], strict=True))
    assert names[0] == "mean over 6 pairs"
    for row in page.map("modules").query("pair > 0").itertuples():
        component = {"MLP": "mlp_output", "attention": "attention_output"}[row.x]
        same = (effects["pair_id"] == names[row.pair]) & (effects["analysis"] == "modules")
        found = effects[same & (effects["component"] == component) & (effects["layer"] == row.layer)]
        assert [row.nie, row.tie, row.te] == pytest.approx(found[["nie", "tie", "te"]].iloc[0].to_list(), rel=1e-5)


def test_a_map_has_every_unit_and_token_once_a_layer(whole: Path) -> None:
    page = read(whole / "view.html")
    assert set(page.map("heads")["x"]) == {"head 0", "head 1"}
    tokens = page.map("tokens")
    assert {"edit[-1]", "after_edit[0]"} <= set(tokens["x"])
    assert not tokens.duplicated(["pair", "x", "layer"]).any()


def test_the_claims_have_the_rows_behind_them(whole: Path) -> None:
    path = whole / "view.html"
    page, html = read(path), path.read_text("utf-8")
    assert "decided <b>late</b>" in page.text  # as text
    assert "b" not in page.elements
    assert "90% [80%, 100%]" in page.text
    assert "NIE above 2/3" in page.text
    assert "-0.2 [-0.3, -0.1]" in page.text  # a number below 0 is no missing one
    assert "why, and 2 rows behind it" in html
    points = [row for row in page.rows("The numbers behind") if "side" in row]
    found = {point["side"]: (point["value"], point["low"], point["high"]) for point in points}
    assert found["harm"] == pytest.approx((0.9, 0.8, 1.0))
    assert found["placebo"] == pytest.approx((0.25, 0.15, 0.35))


def test_sizes_of_sets_are_drawn(whole: Path) -> None:
    page = read(whole / "view.html")
    drawn = [row for row in page.rows("Effect of the first") if row.get("series") == "NIE"]
    assert {row["size"]: row["value"] for row in drawn} == {1: 1 / 64, 8: 1 / 8, 64: 1.0}
    assert "the first 8, chosen" in page.text


def test_views_without_a_table_are_left_out(make: Callable[..., Path]) -> None:
    run = make(claims=False)
    (run / "gate_sets.csv").write_text("size,part\n1,0.5\n", "utf-8")  # of another version
    page = read(write_page([run]))
    assert len(page.charts) == 4
    assert "Claims" not in page.text
    assert "gate_sets.csv of run has no column 'carried_nie'" in page.text


def test_runs_stand_side_by_side(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make("one"), make("two", claims=False)]
    page = read(write_page(runs, tmp_path / "page.html"))
    beside = page.text.split("Runs side by side")[1].split("Runs are not tested")[0]
    assert re.search(r"1\. late layerssupportednot tested", beside)
    assert [chart["description"] for chart in page.charts].count(page.charts[-1]["description"]) == 2


def test_a_run_that_is_named_twice_or_not_there_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make()
    with pytest.raises(SettingsError, match="named twice"):
        write_page([run, run.parent / "." / "run"])
    with pytest.raises(StoreError, match="no run folder"):
        write_page([tmp_path / "nowhere"])
    (run / "effects.csv").unlink()
    with pytest.raises(StoreError, match="remote-mediation report"):
        write_page([run])


def test_ids_are_data(tmp_path: Path) -> None:
    path = write_page([measure(tmp_path, HOSTILE)])
    page, html = read(path), path.read_text("utf-8")
    assert "img" not in page.elements
    assert page.elements.count("script") == len(page.charts) + 2
    assert HOSTILE not in html
    assert HOSTILE in page.choice("layers")["labels"]


def test_nothing_is_fetched_and_the_page_is_small(whole: Path) -> None:
    path = whole / "view.html"
    html = path.read_text("utf-8")
    assert path.stat().st_size < LIMIT
    assert "default-src 'none'" in html
    markup = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)\s*=", markup)
    for chart in read(path).charts:
        assert "url" not in json.dumps(chart)


def test_prompts_are_shown_only_when_asked_for(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    hidden = write_page([run]).read_text("utf-8")
    assert not re.search(r"\b(wash|paint|night)\b", re.sub(r"<script>.*?</script>", "", hidden, flags=re.DOTALL))
    monkeypatch.setattr(views, "load_tokenizer", lambda name, revision: words_tokenizer())
    shown = read(write_page([run], show_text=True)).map("tokens")
    mine = shown[(shown["pair"] == 1) & shown["harmful"].notna()].set_index("x")
    assert mine.loc["edit[-1]", ["harmless", "harmful"]].to_list() == ["wash", "steal"]
    assert mine.loc["after_edit[1]", ["harmless", "harmful"]].to_list() == ["car", "car"]


def test_a_folder_that_was_shared_without_its_prompts_is_shown_without_them(make: Callable[..., Path]) -> None:
    run = make()
    (run / "pairs.jsonl").unlink()
    assert "harmful" not in read(write_page([run])).map("tokens")
    with pytest.raises(StoreError, match=r"without its pairs\.jsonl"):
        write_page([run], show_text=True)


def test_pairs_beyond_what_a_page_can_hold_are_counted(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "MOST_ROWS", 2 * 18)  # of 6 layers at 3 positions
    page = read(write_page([make()]))
    assert page.map("layers")["pair"].max() == 2
    assert page.choice("layers")["labels"][0] == "mean over 6 pairs"
    assert "4 pairs more in effects.csv" in page.text


def test_tokens_leave_out_what_is_fed_behind_the_prompt() -> None:
    tokenizer = words_tokenizer()
    pair = token_pair("p", answers=((7, 8, 9), (10,)))
    assert pair.places("last").x1 == (4, 5, 6)  # the last prompt token, and two of an answer
    found = tokens_at([pair], ["last", "edit"], tokenizer)
    assert found["p", "last"] == (tokenizer.decode([5]),) * 2
    assert found["p", "edit"] == (tokenizer.decode([3]), tokenizer.decode([9]))


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible(" the\n") == "␣the↵"
    assert visible("a\u202eb") == "a�b"
    assert visible("  ") == "␣␣"


def test_the_command_writes_the_page(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make()
    monkeypatch.setattr(sys, "argv", ["remote-mediation", "view", str(run)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert f"Page: {run / 'view.html'}" in capsys.readouterr().out
    assert (run / "view.html").is_file()


def answered(address: str, path: str = "/", host: str = "", method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    """What a server answers. host: the name that it is asked by, its own by default."""
    where = urlsplit(address)
    connection = HTTPConnection(str(where.hostname), where.port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    response = connection.getresponse()
    found = response.status, response.read(), {name.lower(): value for name, value in response.getheaders()}
    connection.close()
    return found


@pytest.fixture
def serving() -> Iterator[PageServer]:
    """A server of a page, on a port that was free."""
    with served(b"<p>the page</p>") as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_page_and_nothing_else_is_served(serving: PageServer) -> None:
    status, body, headers = answered(serving.address)
    assert (status, body) == (200, b"<p>the page</p>")
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert answered(serving.address, method="HEAD")[:2] == (200, b"")
    for path in ("/view.html", "/run.json", "/../pairs.jsonl", "/%2e%2e/pairs.jsonl", "/?x", "/etc/passwd"):
        assert answered(serving.address, path)[0] == 404, path
    assert answered(serving.address, method="POST")[0] == 501


def test_only_this_machine_is_answered_and_only_by_its_own_names(serving: PageServer) -> None:
    assert serving.address.startswith("http://127.0.0.1:")
    assert serving.server_address[0] == "127.0.0.1"
    assert answered(serving.address, host=f"localhost:{serving.server_port}")[0] == 200
    for host in ("evil.example", f"evil.example:{serving.server_port}", "127.0.0.1:1"):
        status, body, _ = answered(serving.address, host=host)
        assert (status, b"the page" in body) == (403, False), host


def test_a_port_in_use_is_named(serving: PageServer) -> None:
    with pytest.raises(SettingsError, match=rf"port {serving.server_port}: .*in use; choose another --port"):
        served(b"", serving.server_port)


@pytest.mark.slow
def test_the_command_serves_the_page_until_ctrl_c(make: Callable[..., Path]) -> None:
    run = make()
    command = [sys.executable, "-m", "remote_mediation", "view", str(run), "--serve", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored where tests run
    ) as shown:
        assert shown.stdout is not None
        lines = [shown.stdout.readline() for _ in range(4)]  # a brace, two keys and a brace
        found = json.loads("".join(lines))
        status, body, _ = answered(found["address"])
        shown.send_signal(signal.SIGINT)
        _, errors = shown.communicate(timeout=30)
    assert (shown.returncode, errors) == (0, "")
    assert (status, body) == (200, (run / "view.html").read_bytes())
    with pytest.raises(ConnectionRefusedError):
        answered(found["address"])


def test_without_altair_it_says_what_to_install(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(SettingsError, match=r"remote-mediation\[view\]"):
        write_page([make()])


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """What headless Chromium makes of a page, as HTML without scripts; a picture of it is taken beside it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium on PATH")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--virtual-time-budget=15000", "--window-size=1280,2400"]

    def seen(page: Path, *more: str) -> str:
        command = [browser, *flags, *(more or ["--dump-dom"]), page.as_uri()]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)

    return seen


@pytest.mark.slow
def test_a_browser_draws_it(browse: Callable[..., str], tmp_path: Path) -> None:
    """Every chart is drawn, no id has become markup, and the choice of a pair is there."""
    run = measure(tmp_path, HOSTILE)
    add_claims(run)
    path = write_page([run])
    picture = tmp_path / "page.png"
    browse(path, f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000
    dom = browse(path)
    assert dom.count('data-drawn="yes"') == len(read(path).charts) == 6
    assert "could not be drawn" not in dom
    assert "owned" not in re.findall(r"<title>(.*?)</title>", dom)[0]
    assert "<img" not in dom
    assert "mean over 6 pairs</option>" in dom


@pytest.mark.slow
def test_a_pair_is_chosen_and_its_numbers_stand_under_the_pointer(
    browse: Callable[..., str], make: Callable[..., Path]
) -> None:
    run = make()
    path = write_page([run])
    start, end = path.read_text("utf-8").rsplit("</body>", 1)
    path.write_text(f"{start}<script>{POINT_AT_A_CELL}</script></body>{end}", "utf-8")
    found = dict(re.findall(r'<td class="key">(.*?)</td><td class="value">(.*?)</td>', browse(path)))
    effects = pd.read_csv(run / "effects.csv")
    third = effects["pair_id"] == list(dict.fromkeys(effects["pair_id"]))[2]
    cell = (effects["analysis"] == "layers") & (effects["layer"] == int(found["layer"]))
    row = effects[third & cell & (effects["position"] == found["site"])].iloc[0]
    assert float(found["NIE (logits)"].replace("\u2212", "-")) == pytest.approx(row["nie"], rel=0.01)
    assert found["95% interval"] == "none: a single pair"

"""Cover of 95% intervals and error rates of tests, by number of clusters: of means, shares and rates.

Studies are simulated whose truth is known, and each is estimated as the package does it and by the percentiles it used
before (of rates: by Wilson's interval of the items as if they were independent). An interval covers if it holds the
truth. It lies *above* or *below* it otherwise: each is the error rate of a verdict at a threshold that is the truth,
2.5% if all is well. `p` is how often the sign-flip p of a mean that is 0 is at most 0.05. A share is covered where the
test of its true value does not reject, which is what its interval is made of. Studies whose share is undefined are
counted apart and left out of the cover.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import NDArray

from remote_mediation.rates import rate
from remote_mediation.stats import Interval, estimate_means, wilson

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "reports"
CLUSTERS = (6, 8, 10, 15, 17, 35)
RUNS = ("refusing-smollm2", "quickstart")
SEED = 20260
STUDIES, BATCH, RESAMPLES = 4000, 250, 1999
"""A batch of studies shares its resamples, as the sites of a run do; another batch has others."""
NEW, OLD = "now", "before"

Floats = NDArray[np.float64]


class Studies(NamedTuple):
    """Simulated studies with true mean 0 of `noise` and true share 1/2 of effect in total; NaN pads short clusters."""

    noise: Floats
    """[study, pair]"""
    effect: Floats
    """[study, pair]"""
    total: Floats
    """[study, pair]"""
    clusters: NDArray[np.intp]
    """[pair]"""


class Ends(NamedTuple):
    """Ends of intervals."""

    low: Floats
    """[study]"""
    high: Floats
    """[study]"""


def main() -> None:
    """Simulate everything, write the CSV and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=STUDIES, help="studies simulated for every row of the table")
    asked = parser.parse_args()
    begun = time.perf_counter()
    rows: list[dict[str, object]] = []
    for row in calibrate(asked.studies):
        print(row, flush=True)
        rows.append(row)
    table = pd.DataFrame(rows)
    folder = REPORTS / "benchmark"
    table.to_csv(folder / "calibration.csv", index=False, float_format="%.4f")
    (folder / "calibration.md").write_text(as_markdown(table, asked.studies), "utf-8")
    print(f"{time.perf_counter() - begun:.0f} s")


def calibrate(studies: int) -> Iterator[dict[str, object]]:
    """One row for each statistic, kind of data, number of clusters and method."""
    for number, (name, simulate) in enumerate(kinds_of_data().items()):
        for k in CLUSTERS:
            yield from _means_and_shares(name, simulate, k, studies, np.random.default_rng([SEED, number, k]))
    for chance in (0.5, 0.9):
        for k in CLUSTERS:
            yield from _rates(chance, k, studies, np.random.default_rng([SEED, int(100 * chance), k]))


def kinds_of_data() -> dict[str, Callable[[np.random.Generator, int], Studies]]:
    """Simulators of BATCH studies from a generator and the number of clusters."""
    skew = np.exp(0.5)

    def lognormal(rng: np.random.Generator, *shape: int) -> Floats:
        return (rng.lognormal(size=shape) - skew) / np.sqrt((np.e - 1) * np.e)

    def sparse(rng: np.random.Generator, *shape: int) -> Floats:
        return rng.binomial(1, 0.2, size=shape) * rng.lognormal(size=shape) - 0.2 * skew

    drawn: dict[str, Callable[..., Floats]] = {
        "normal": lambda rng, *shape: rng.normal(size=shape),
        "t3": lambda rng, *shape: rng.standard_t(3, size=shape) / np.sqrt(3),
        "lognormal": lognormal,
        "sparse": sparse,
    }
    kinds = {name: _simulator(draw) for name, draw in drawn.items()}
    return kinds | {f"residuals of {run}": _resampler(population(run)) for run in RUNS}


def _simulator(draw: Callable[..., Floats]) -> Callable[[np.random.Generator, int], Studies]:
    """Clusters of 1, 2 and 3 pairs, half of the variance between them; sparse data agree within a cluster."""

    def simulate(rng: np.random.Generator, k: int) -> Studies:
        clusters = np.repeat(np.arange(k), np.arange(k) % 3 + 1)

        def noise() -> Floats:
            between, within = draw(rng, BATCH, k)[:, clusters], draw(rng, BATCH, clusters.size)
            return np.sqrt(0.5) * (between + within)

        total = 1 + 0.8 * noise()
        return Studies(noise(), 0.5 * total + 0.3 * noise(), total, clusters)

    return simulate


def population(run: str) -> Floats:
    """Effects and totals of a shipped run, [site and direction, 2, cluster, pair in cluster], padded with NaN.

    Effects are residuals, of the site's share in the total, plus half of the total.
    """
    table = pd.read_csv(REPORTS / run / "effects.csv", low_memory=False)
    table = table[table["granularity"].isin(["layers", "modules"])]
    table = table.assign(place=table.groupby("cluster")["pair_id"].transform(lambda ids: pd.factorize(ids)[0]))
    sites: list[Floats] = []
    for _, site in table.groupby(["component", "layer", "position"]):
        total, nie, tie = (site.pivot(index="cluster", columns="place", values=name) for name in ("te", "nie", "tie"))
        for effect in (nie, tie):
            share = np.nansum(effect) / np.nansum(total)
            residual = effect - share * total
            if np.nanstd(residual) > 1e-3 * np.nanstd(total):  # else an identity: no residuals to draw from
                sites.append(np.stack([residual + 0.5 * total, total]))
    return np.stack(sites)


def _resampler(sites: Floats) -> Callable[[np.random.Generator, int], Studies]:
    """Studies of one site each, whose clusters are drawn with replacement from the run's."""

    def simulate(rng: np.random.Generator, k: int) -> Studies:
        site = rng.integers(len(sites), size=(BATCH, 1))
        cluster = rng.integers(sites.shape[2], size=(BATCH, k))
        drawn = sites[site, :, cluster]  # [study, cluster, 2, pair in cluster]
        effect, total = np.moveaxis(drawn, 2, 0).reshape(2, BATCH, -1)
        return Studies(effect - 0.5 * total, effect, total, np.repeat(np.arange(k), sites.shape[3]))

    return simulate


def _means_and_shares(
    name: str, simulate: Callable[[np.random.Generator, int], Studies], k: int, studies: int, rng: np.random.Generator
) -> Iterator[dict[str, object]]:
    found: dict[tuple[str, str], list[Ends]] = {}
    p: list[float] = []
    for _ in range(max(1, studies // BATCH)):
        made = simulate(rng, k)
        means = estimate_means(made.noise, made.clusters, rng, RESAMPLES)
        p += [one.p for one in means]
        found.setdefault(("mean", NEW), []).append(_ends(means))
        found.setdefault(("share", NEW), []).append(_share_tests(made, rng))
        for statistic, ends in zip(("mean", "share"), _percentiles(made, k, rng), strict=True):
            found.setdefault((statistic, OLD), []).append(ends)
    for (statistic, method), batches in found.items():
        ends = Ends(*np.concatenate(batches, axis=1))
        alarms = float(np.mean(np.array(p) <= 0.05)) if (statistic, method) == ("mean", NEW) else np.nan
        yield _row(statistic, name, k, method, ends, 0.0) | {"p": alarms}


def _ends(intervals: list[Interval]) -> Ends:
    return Ends(np.array([one.low for one in intervals]), np.array([one.high for one in intervals]))


def _share_tests(made: Studies, rng: np.random.Generator) -> Ends:
    """Ends of mean(effect - total / 2), around 0 where the share is around 1/2; NaN where it is undefined."""
    low, high = _ends(estimate_means(made.effect - 0.5 * made.total, made.clusters, rng, RESAMPLES))
    base = estimate_means(made.total, made.clusters, rng, RESAMPLES)
    undefined = np.array([one.sign == 0 for one in base])
    return Ends(np.where(undefined, np.nan, low), np.where(undefined, np.nan, high))


def _percentiles(made: Studies, k: int, rng: np.random.Generator) -> tuple[Ends, Ends]:
    """Expanded percentiles (Hesterberg 2015) of the mean, and of the share minus 1/2, which the package used before."""
    tail = scipy.stats.norm.cdf(scipy.stats.t.ppf(0.025, k - 1) * np.sqrt(k / (k - 1)))
    weights = rng.multinomial(k, np.full(k, 1 / k), size=RESAMPLES).T.astype(float)
    counts = _sums(np.isfinite(made.noise), made.clusters, k) @ weights
    noise, effect, total = (_sums(np.nan_to_num(x), made.clusters, k) @ weights for x in made[:3])

    def quantiles(outcomes: Floats) -> Ends:
        return Ends(*np.quantile(outcomes, [tail, 1 - tail], axis=1))

    base, shares = quantiles(total / counts), quantiles(effect / total - 0.5)
    undefined = (base.low <= 0) & (base.high >= 0)
    low, high = (np.where(undefined, np.nan, end) for end in shares)
    return quantiles(noise / counts), Ends(low, high)


def _sums(values: NDArray[np.generic], clusters: NDArray[np.intp], k: int) -> Floats:
    """[study, pair] to [study, cluster]."""
    return values.astype(float) @ (clusters[:, None] == np.arange(k))


def _rates(chance: float, k: int, studies: int, rng: np.random.Generator) -> Iterator[dict[str, object]]:
    """Clusters of 1, 2 and 3 items with an intraclass correlation of 1/2 (beta-binomial)."""
    clusters = np.repeat(np.arange(k), np.arange(k) % 3 + 1)
    hits = [rng.random(clusters.size) < rng.beta(chance, 1 - chance, size=k)[clusters] for _ in range(studies)]
    name = f"rate {chance:.0%}"
    yield _row("rate", name, k, NEW, _ends([rate(one, clusters) for one in hits]), chance)
    yield _row("rate", name, k, OLD, _ends([wilson(int(one.sum()), one.size) for one in hits]), chance)


def _row(statistic: str, data: str, k: int, method: str, ends: Ends, truth: float) -> dict[str, object]:
    known = np.isfinite(ends.low)
    low, high = ends.low[known], ends.high[known]
    return {
        "statistic": statistic,
        "data": data,
        "clusters": k,
        "method": method,
        "studies": known.size,
        "cover": float(np.mean((low <= truth) & (high >= truth))) if known.any() else np.nan,
        "above": float(np.mean(low > truth)) if known.any() else np.nan,
        "below": float(np.mean(high < truth)) if known.any() else np.nan,
        "undefined": float(np.mean(~known)),
    }


def as_markdown(table: pd.DataFrame, studies: int) -> str:
    """The cover of every method, with the two errors behind it, as tables with a column for each number of clusters."""
    error = np.sqrt(0.95 * 0.05 / studies)
    lines = [
        "# Calibration",
        "",
        f"Made by `scripts/bench/calibration`, {studies:,} simulated studies a cell (one standard error: {error:.1%}), "
        f"{RESAMPLES:,} resamples, seed {SEED}.",
        "Cover of 95% intervals in percent; in brackets how often the interval lies above and below the truth, which "
        "are the error rates of a verdict at a threshold equal to the truth (2.5 each if all is well). *Now*: means "
        "and shares by a studentised cluster bootstrap from 15 clusters on, by t below, rates by Wilson's interval of "
        "an effective number of items; *before*: expanded percentiles, rates by Wilson's interval of all items.",
        "Normal, t3, lognormal: clusters of 1 to 3 pairs, half of the variance between clusters. Sparse: four in five "
        "values are one constant, the rest lognormal. Residuals: the clusters of a shipped run drawn with replacement, "
        "one site and direction a study. Share: E = TE / 2 and noise.",
    ]
    for statistic, part in table.groupby("statistic", sort=False):
        lines += ["", f"## {str(statistic).capitalize()}", "", *_cover_table(part)]
        if statistic == "share":
            lines += [
                "",
                "Undefined (the interval of TE spans 0), in percent of studies:",
                "",
                *_plain(part, "undefined"),
            ]
        if statistic == "mean":
            alarms = part[part["method"] == NEW]
            lines += ["", "Sign-flip p of at most 0.05 though the mean is 0, in percent of studies:", ""]
            lines += _plain(alarms, "p")
    return "\n".join(lines) + "\n"


def _cover_table(part: pd.DataFrame) -> list[str]:
    shown = [f"{100 * r.cover:.1f} ({100 * r.above:.1f}, {100 * r.below:.1f})" for r in part.itertuples()]
    return _grid(part.assign(shown=shown))


def _plain(part: pd.DataFrame, column: str) -> list[str]:
    return _grid(part.assign(shown=[f"{100 * value:.1f}" for value in part[column]]))


def _grid(part: pd.DataFrame) -> list[str]:
    """Rows of a Markdown table of the column `shown`: data and method down, clusters across."""
    lines = [
        "| data | | " + " | ".join(f"{k} clusters" for k in CLUSTERS) + " |",
        "|---|---|" + "---:|" * len(CLUSTERS),
    ]
    for (data, method), row in part.groupby(["data", "method"], sort=False):
        lines.append(f"| {data} | {method} | " + " | ".join(row["shown"]) + " |")
    return lines


if __name__ == "__main__":
    main()

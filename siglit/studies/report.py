"""The pages of a study under docs/studies: Markdown, one self-contained HTML page, a PNG, and a JSON for the summary.

`findings.py` decides what was found, `plots.py` draws it; here it becomes sentences and tables. Names come from files
and are escaped; figures are in percent where a measure is a fraction.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglit.runtime.files import write_bytes, write_json
from siglit.studies import markdown, paper, plots, statistics, summary
from siglit.studies.definition import Study
from siglit.studies.findings import Arm, Contrast, Findings, Measure, find
from siglit.studies.markdown import text
from siglit.studies.records import Record, read_records, records_folder
from siglit.studies.study_file import read_study

_MAX_NAMED = 6
"""More arms are counted in a sentence instead of named."""


@dataclass(frozen=True)
class StudyReport:
    """Verdict of a study and the files of its report."""

    name: str
    verdict: str
    runs: int
    """Runs that are there and up to date."""
    total: int
    expectations: list[str]
    """A line each: verdict, what was expected, the contrast with its interval."""
    files: list[str]

    def __str__(self) -> str:
        """The verdict, a line per expectation, and the files."""
        counts = f"{self.runs:,} of {self.total:,} runs"
        return "\n".join([f"{self.name}: {self.verdict} ({counts})", *self.expectations, *self.files])


def report_study(config: str | Path, out: str | Path = "docs/studies", *, full: bool = False) -> StudyReport:
    """Report on a study file from the records below `out`.

    Args:
        config: the study file.
        out: folder of the pages; the records are in its data/NAME.
        full: the longer form, whose page is NAME-full.

    Raises:
        UserError: the study file, a record, the paper's table or the JSON of another study is malformed, or
            matplotlib is missing.
    """
    study = read_study(config, full=full)
    return report(study, read_records(records_folder(Path(out), study.name), study.name), Path(out))


def report(study: Study, records: Sequence[Record], out: Path) -> StudyReport:
    """Write NAME.md, NAME.html, NAME.png and data/NAME.json into `out`, and its README.md anew.

    Raises:
        UserError: matplotlib is missing, or the paper's table or the JSON of another study is malformed.
    """
    findings = find(study, records)
    name = study.name
    drawn = plots.panels(findings)
    body = _page(findings, len(drawn) > 0)
    (out / "data").mkdir(parents=True, exist_ok=True)
    files = {out / f"{name}.md": f"{body}\n".encode(errors="replace")}
    if len(drawn) > 0:
        files[out / f"{name}.png"] = plots.draw_png(drawn, plots.LIGHT, columns=2)
    drawings = [
        (panel.title, plots.draw_png([panel], plots.LIGHT), plots.draw_png([panel], plots.DARK)) for panel in drawn
    ]
    files[out / f"{name}.html"] = markdown.page(study.title, body, f"{name}.png", drawings).encode(errors="replace")
    for path, data in files.items():
        write_bytes(path, data)
    write_json(out / "data" / f"{name}.json", _facts(findings))
    readme = summary.write_summary(out)
    lines = [f"  {found.verdict}: {found.expectation.say}: {_in_words(found)}" for found in findings.contrasts]
    paths = [str(path) for path in (*files, readme)]
    return StudyReport(name, findings.verdict, len(findings.used), findings.total, lines, paths)


def _page(findings: Findings, has_image: bool) -> str:
    study = findings.study
    parts = [
        f"# {text(_title(study))}",
        f"{text(study.claim)} ({text(study.source)})",
        f"**Verdict: {findings.verdict}.** {summary.MEANINGS[findings.verdict]} The words are explained in the "
        "[summary of all studies](README.md).",
        _state(findings),
        "## What was expected",
        _expectations(findings.contrasts),
        "## What was measured",
        f"On {_split(study)}: mean ± standard deviation over seeds. {_selection(findings)}",
        _arms(findings),
        f"![{text(study.title)}: measures by arm]({study.name}.png)" if has_image else "",
        "In the plots, bars are standard deviations over seeds, faint marks are single seeds"
        + (", and bands reach from the lowest to the highest seed." if len(study.curves) + len(study.kept) else ".")
        if has_image
        else "",
        *(["## Notes", markdown.prose(study.notes)] if study.notes.strip() else []),
        *_paper(study),
        *_grid(findings),
        *_left_out(findings),
        "## How to repeat it",
        _commands(study),
        markdown.bullets(_provenance(findings.used)),
    ]
    return "\n\n".join(part for part in parts if part)


def _state(findings: Findings) -> str:
    """How much of the study there is."""
    done = f"{len(findings.used):,} of {findings.total:,} runs are there"
    names = {"do not count": findings.stale, "failed": findings.failed}
    rest = [f"{len(entries):,} {what}" for what, entries in names.items() if len(entries) > 0]
    return f"{'; '.join([done, *rest])}." if len(findings.used) < findings.total or len(rest) > 0 else ""


def _title(study: Study) -> str:
    return study.title + (" (full length)" if study.full else "")


def _split(study: Study) -> str:
    if all(study.test_of(arm) for arm in study.arms()):
        return "the test split"
    reason = ", so the learning rates were chosen on the same data" if len(study.learning_rates) > 1 else ""
    return f"the validation split (the study names no test split{reason})"


def _selection(findings: Findings) -> str:
    rates = findings.study.learning_rates
    if len(rates) <= 1:
        return f"All arms use the learning rate {rates[0]:g}." if len(rates) == 1 else ""
    primary = text(findings.measures[0].name)
    shown = ", ".join(f"{rate:g}" for rate in rates)
    chosen = (
        f"Each arm's learning rate is the one of {shown} with the highest {primary} on val, in a run of another seed."
    )
    titles = [text(arm.title) for arm in findings.at_edge]
    if len(titles) > _MAX_NAMED:
        titles = [f"{len(titles)} of {len(findings.arms)} arms"]
    edge = f" For {'; '.join(titles)} it is the lowest or the highest of these: a better one may lie outside."
    return chosen + (edge if len(titles) > 0 else "")


def _expectations(contrasts: Sequence[Contrast]) -> str:
    rows = []
    for found in contrasts:
        margin = found.expectation.margin
        above = f", by more than {_signed(margin, found.measure).lstrip('+')}" if margin else ""
        rows.append(
            [
                text(found.expectation.say),
                f"**{found.verdict}**",
                _signed(found.estimate.mean, found.measure),
                _interval(found),
                str(found.estimate.n),
                text(found.measure.name) + _unit(found.measure) + above,
            ]
        )
    header = ["expected", "verdict", "paired difference", "95 % interval", "seeds", "measure"]
    return markdown.table(header, rows, left=2)


def _arms(findings: Findings) -> str:
    study, arms = findings.study, findings.arms
    columns = [_means(measure, arms) for measure in findings.measures]
    rows = []
    for i, arm in enumerate(arms):
        failed = sum(record.failed is not None for record in arm.finals.values())
        seeds = str(len(arm.finals)) + (f" ({failed} failed)" if failed else "")
        rate = "–" if arm.learning_rate is None else f"{arm.learning_rate:g}"
        rows.append([*map(text, arm.points.values()), rate, *(column[i] for column in columns), seeds])
    header = [*map(text, study.axes), "learning rate", *(text(m.name) + _unit(m) for m in findings.measures), "seeds"]
    return markdown.table(header, rows, left=len(study.axes))


def _means(measure: Measure, arms: Sequence[Arm]) -> list[str]:
    """Mean ± standard deviation for each arm, with the same decimals."""
    factor = 100.0 if measure.percent else 1.0
    values = [[factor * value for value in arm.values(measure).values()] for arm in arms]
    largest = max((abs(value) for per_arm in values for value in per_arm), default=0.0)
    decimals = 1 if measure.percent else _decimals(largest)
    cells = []
    for per_arm in values:
        spread = f" ± {statistics.sample_sd(per_arm):.{decimals}f}" if len(per_arm) > 1 else ""
        cells.append(f"{statistics.mean(per_arm):.{decimals}f}{spread}" if len(per_arm) > 0 else "–")
    return cells


def _decimals(largest: float) -> int:
    """Decimals that show four digits of the largest value of a column, at most six."""
    return min(6, max(0, 3 - math.floor(math.log10(largest)))) if largest > 0 else 0


def _paper(study: Study) -> list[str]:
    parts = [markdown.prose(study.paper.note)]
    if study.paper.table is not None:
        table = paper.read_table(study.paper.table)
        what = f"{text(table.metric)}, in percent" if table.metric else "In percent"
        parts.append(f"{what} as printed. The paper's models are larger, and its data are others and far more.")
        parts.append(markdown.table([*map(text, table.header)], [[*map(text, row)] for row in table.rows]))
    return ["## In the paper", *parts] if any(parts) else []


def _grid(findings: Findings) -> list[str]:
    rates, primary = findings.study.learning_rates, findings.measures[0]
    if len(rates) <= 1:
        return []
    rows = []
    for arm in findings.arms:
        cells = []
        for rate in rates:
            value = arm.grid.get(rate)
            shown = "–" if rate not in arm.grid else "failed" if value is None else _shown(value, primary)
            cells.append(f"**{shown}**" if rate == arm.learning_rate else shown)
        rows.append([text(arm.title), *cells])
    header = ["arm", *(f"{rate:g}" for rate in rates)]
    about = f"{text(primary.name)}{_unit(primary)} on val by learning rate, one run each; the chosen one is bold."
    return ["## How the learning rates were chosen", about, markdown.table(header, rows)]


def _left_out(findings: Findings) -> list[str]:
    lists = {
        "Missing": findings.missing,
        "Left out, because they are not of the study as it is now; run it again, or remove their files": findings.stale,
        "Failed: on val the worst, in the results left out with the runs they are paired with": findings.failed,
    }
    parts = [part for title, names in lists.items() if names for part in (f"{title}:", markdown.bullets(names))]
    return ["## Runs that are missing or left out", *parts] if len(parts) > 0 else []


def _commands(study: Study) -> str:
    # The page does not tell where on a machine the checkout lies.
    outside = study.path.is_absolute() or ".." in study.path.parts
    words = f"-c {study.path.name if outside else study.path}{' --full' if study.full else ''}"
    return markdown.code([f"siglit study {verb} {words}" for verb in ("run", "report")])


def _provenance(records: Sequence[Record]) -> list[str]:
    versions = _distinct(", ".join(f"{name} {v}" for name, v in record.versions.items()) for record in records)
    return [
        f"hardware: {'; '.join(_distinct(record.hardware for record in records)) or '–'}",
        f"versions: {'; '.join(versions) or '–'}",
        f"commits: {', '.join(_distinct(record.commit or '' for record in records)) or '–'}",
        f"time of all runs together: {sum(record.seconds for record in records):,.0f} s",
    ]


def _distinct(names: Iterable[str]) -> list[str]:
    return sorted(set(names) - {""})


def _facts(findings: Findings) -> dict[str, Any]:
    """What the summary of all studies needs; an infinite end of an interval is null."""
    study, used = findings.study, findings.used
    return {
        "title": _title(study),
        "source": study.source,
        "claim": study.claim,
        "verdict": findings.verdict,
        "expectations": [
            {
                "say": found.expectation.say,
                "measure": found.measure.name,
                "percent": found.measure.percent,
                "margin": found.expectation.margin,
                **{
                    end: value if math.isfinite(value := getattr(found.estimate, end)) else None
                    for end in ("mean", "low", "high")
                },
                "n": found.estimate.n,
                "by_seed": {str(seed): value for seed, value in found.by_seed.items()},
                "verdict": found.verdict,
                "in_words": _in_words(found),
            }
            for found in findings.contrasts
        ],
        "runs": len(used),
        "total": findings.total,
        "stale": len(findings.stale),
        "failed": len(findings.failed),
        "seconds": round(sum(record.seconds for record in used), 1),
        "hardware": _distinct(record.hardware for record in used),
        "commit": _distinct(record.commit or "" for record in used),
    }


def _unit(measure: Measure) -> str:
    return ", %" if measure.percent else ""


def _shown(value: float, measure: Measure) -> str:
    return f"{100 * value:.1f}" if measure.percent else f"{value:.4g}"


def _signed(value: float, measure: Measure) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:+.2f}" if measure.percent else f"{value:+.3g}"


def _interval(found: Contrast) -> str:
    if not math.isfinite(found.estimate.low):
        return "–"
    return f"{_signed(found.estimate.low, found.measure)} … {_signed(found.estimate.high, found.measure)}"


def _in_words(found: Contrast) -> str:
    """R@10 +2.30 points (+1.10 … +3.50), 5 seeds."""
    if found.estimate.n == 0:
        return f"{found.measure.name}: no seed has all of its runs"
    unit = " points" if found.measure.percent else ""
    seeds = "1 seed" if found.estimate.n == 1 else f"{found.estimate.n} seeds"
    return f"{found.measure.name} {_signed(found.estimate.mean, found.measure)}{unit} ({_interval(found)}), {seeds}"

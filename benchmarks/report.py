"""The tables of ``benchmarks.solvers``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .problems import KEPT_BACK
from .record import markdown_table
from .work_precision import Key, Point, Ratio, ratio, work_at

Found = dict[Key, list[Point]]
FEW = 16  # evaluations: below, another table


def row(point: Point) -> dict[str, Any]:
    """A point as a line of the CSV file."""
    return {
        "problem": point.problem,
        "sde": point.sde,
        "solver": point.solver,
        "setting": point.setting,
        "evaluations": point.evaluations,
        "calls": point.calls,
        "rms": point.rms,
        "median_rms": point.median_rms,
    }


def unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def measures(found: Found) -> list[tuple[str, str, str]]:
    """``(solver, work, label)``: solvers that step each sample by itself are shown twice, by what a sample needs on
    average, and by what the batch pays where it waits for the slowest."""
    listed = []
    for solver in unique(solver for _, _, solver in found):
        points = [p for key, curve in found.items() if key[2] == solver for p in curve]
        if all(p.evaluations == p.calls for p in points):
            listed.append((solver, "evaluations", solver))
        else:
            listed.append((solver, "evaluations", f"{solver}, slots refilled"))
            listed.append((solver, "calls", f"{solver}, waiting for the slowest"))
    return listed


def groups(found: Found) -> list[tuple[str, list[str]]]:
    """The problems of each kind."""
    names = unique(problem for problem, _, _ in found)
    mixtures = [name for name in names if name.startswith("mixture")]
    digits = [name for name in names if name == "digits"]
    kept_back = [name for name in names if name in KEPT_BACK]
    return [(label, group) for label, group in (("mixtures", mixtures), ("digits", digits), ("kept back", kept_back))
            if group]  # fmt: skip


def tables(found: Found, baseline: str, targets: Sequence[float]) -> tuple[str, list[dict[str, Any]]]:
    """All of them as Markdown, and the ratios of the first as JSON can hold them."""
    first, ratios = ratio_table(found, baseline, targets)
    parts = [first, work_table(found, targets)]
    if any(problem == "digits" for problem, _, _ in found):
        parts.append(few_table(found))
    return "\n\n".join(parts), [asdict(r) for r in ratios]


def ratio_table(found: Found, baseline: str, targets: Sequence[float]) -> tuple[str, list[Ratio]]:
    columns = [
        (group, error, target)
        for error in ("rms", "median_rms")
        for group in groups(found)
        for target in targets
    ]  # fmt: skip
    lines, ratios = [], []
    for solver, work, label in measures(found):
        line = [ratio(found, baseline, solver, work, group, error, target) for group, error, target in columns]
        ratios += line
        lines.append([label, *(show_ratio(r) for r in line)])
    header = [f"{'median sample, ' if e == 'median_rms' else ''}{name}, {t:g}" for (name, _), e, t in columns]
    text = (
        f"Evaluations of the network relative to {baseline}'s at equal RMS error: geometric means over VP, sub-VP, VE "
        "and the problems. (n/m): m - n of them did not reach the error."
    )
    return f"{text}\n\n{markdown_table(['solver', *header], lines)}", ratios


def show_ratio(r: Ratio) -> str:
    if r.ratio is None:
        return "not reached"
    return f"{r.ratio:.2f}" + ("" if r.reached == r.of else f" ({r.reached}/{r.of})")


def work_table(found: Found, targets: Sequence[float]) -> str:
    columns = unique((problem, sde) for problem, sde, _ in found)
    lines = []
    for solver, work, label in measures(found):
        cells = []
        for problem, sde in columns:
            values = [work_at(found[problem, sde, solver], target, "rms", work) for target in targets]
            cells.append(" / ".join("–" if v is None else f"{v:.0f}" for v in values))
        lines.append([label, *cells])
    text = f"Evaluations for an RMS error of {' / '.join(f'{t:g}' for t in targets)} (–: not reached)."
    return f"{text}\n\n{markdown_table(['solver', *(f'{p}, {s}' for p, s in columns)], lines)}"


def few_table(found: Found) -> str:
    """RMS errors on the digits where there are fewer than 16 evaluations."""
    curves = {key: [p for p in curve if p.calls < FEW] for key, curve in found.items() if key[0] == "digits"}
    on_grid = {key: curve for key, curve in curves.items() if curve and curve[0].setting >= 1}
    counts = sorted({int(p.setting) for curve in on_grid.values() for p in curve})
    lines = []
    for (_, sde, solver), curve in on_grid.items():
        errors = {int(p.setting): p.rms for p in curve}
        lines.append([f"{sde}, {solver}", *(f"{errors.get(n, math.nan):.1e}" for n in counts)])
    text = f"RMS error on the digits with fewer than {FEW} evaluations."
    return f"{text}\n\n{markdown_table(['evaluations', *map(str, counts)], lines)}"

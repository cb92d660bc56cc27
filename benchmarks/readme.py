"""README's measured numbers: ``python -m benchmarks.readme``

Between ``<!-- measured: NAME -->`` and ``<!-- end -->`` README.md says what a function of this module makes of the
files in ``benchmarks/results``. No number that was measured stands anywhere else on the page.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import digits, record
from .cases import BY_SIZE, CASES, EAGER, OURS
from .report import show_ratio, unique
from .work_precision import Ratio, work_at

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^(<!-- measured: ([^\n]+) -->\n)(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
ABSENT = "—"  # in place of what was not measured, or not reached

SOLVERS = {  # shown, under this name
    "scipy RK45": "scipy RK45",
    "torchdiffeq dopri5": "torchdiffeq dopri5",
    "torchode dopri5": "torchode dopri5",
    "RK45 in the angle": "RK45 in the angle",
    "DPM-Solver++(2M), Karras grid": "DPM-Solver++(2M), Karras grid",
    "UniPC-4 adaptive": "UniPC-4, adaptive",
    "UniPC-3 calibrated, theory": "UniPC-3, calibrated grid, theory's coefficients",
    "UniPC-3 calibrated, fitted": "UniPC-3, calibrated grid, fitted coefficients",
}
FITTED = "UniPC-3 calibrated, fitted"
FEW = 10  # evaluations


def load(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def scientific(value: float, digits: int = 1) -> str:
    """As Python's ``e``, with an exponent of one digit: 1.8e-2."""
    return re.sub(r"e([+-])0", r"e\1", f"{value:.{digits}e}")


def listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def machine(results: dict[str, Any]) -> str:
    where, versions = results["environment"]["machine"], results["environment"]["versions"]
    torch = versions["torch"].partition("+")[0]
    return f"{where['processor']}, {where['cores']} cores, {where['instruction_set']}; torch {torch}"


# ---- evaluations for an error ----


def solvers(folder: Path) -> str:
    """A table: evaluations relative to those of scipy's RK45, the fewest of each column in bold."""
    ratios = [Ratio(**r) for r in load(folder, "solvers.json")["ratios"]]
    ratios = [r for r in ratios if (r.work, r.error) == ("evaluations", "rms") and r.solver in SOLVERS]
    columns = unique((r.problems, r.target) for r in ratios)
    found = {(r.solver, r.problems, r.target): r for r in ratios}

    def cell(solver: str, column: tuple[str, float]) -> str:
        r = found.get((solver, *column))
        if r is None or r.ratio is None:
            return ABSENT
        least = min(other.ratio for other in ratios if other.ratio and (other.problems, other.target) == column)
        return f"**{show_ratio(r)}**" if r.ratio == least else show_ratio(r)

    lines = [[name, *(cell(solver, column) for column in columns)] for solver, name in SOLVERS.items()]
    header = [f"{problems}, {scientific(target, 0)}" for problems, target in columns]
    return record.markdown_table(["RMS error", *header], lines)


def few_evaluations(folder: Path) -> str:
    rows = record.read_csv(folder / "solvers.csv")
    errors = [
        f"{scientific(float(row['rms']))} ({row['sde']})"
        for row in rows
        if (row["problem"], row["solver"], float(row["setting"])) == ("digits", FITTED, FEW)
    ]
    return paragraph(
        f"With {FEW} evaluations the fitted grid leaves an RMS error on the digits of {listed(errors or [ABSENT])}."
    )


# ---- time ----


def speed(folder: Path) -> str:
    """A table of speed-ups by best times, and the memory of a loss step."""
    rows = record.read_csv(folder / "speed.csv")
    best = {(r["case"], r["shape"], int(r["threads"]), r["competitor"]): float(r["best"]) for r in rows}
    threads = sorted({n for _, _, n, _ in best})

    def speed_up(case: str, shape: str, n: int) -> str:
        """The baseline may take fewer threads: with two, scipy's solver is much slower than with one."""
        baselines = [best.get((case, shape, fewer, CASES[case].baseline)) for fewer in threads if fewer <= n]
        ours, others = best.get((case, shape, n, OURS)), [seconds for seconds in baselines if seconds]
        return f"{min(others) / ours:.1f}" if ours and others else ABSENT

    lines = [
        [f"{case}, {shape_text(shape)}", CASES[case].baseline, *(speed_up(case, shape, n) for n in threads)]
        for case in CASES
        if case != BY_SIZE  # shown as a picture
        for shape in unique(shape for name, shape, _, _ in best if name == case)
    ]
    header = ["step", "against", *(f"{n} thread{'s' if n > 1 else ''}" for n in threads)]
    peaks = {(r["shape"], r["competitor"]): int(r["peak_bytes"]) for r in rows if r["peak_bytes"]}
    images = [shape for shape, name in peaks if name == OURS and shape.count("x") == 3]
    shares = [peaks[shape, OURS] / peaks[shape, EAGER] for shape in images]
    memory = f"{max(shares):.2f}" if shares else ABSENT
    return "\n\n".join([
        paragraph(f"{machine(load(folder, 'speed.json'))}, float32:"),
        record.markdown_table(header, lines),
        paragraph(f"At its peak a loss step of images holds {memory} of eager torch's memory."),
    ])  # fmt: skip


def shape_text(shape: str) -> str:
    """16x3 as (16, 3)."""
    return f"({shape.replace('x', ', ')})"


def end_to_end(folder: Path) -> str:
    """Digits a second where samplers have one error."""
    rows = record.read_csv(folder / "digits.csv")

    def rate(sampler: str) -> float | None:
        curve = [
            digits.Timed(sampler, float(r["setting"]), int(r["samples"]), int(r["calls"]), float(r["seconds"]),
                         float(r["rms"]))
            for r in rows if r["sampler"] == sampler
        ]  # fmt: skip
        seconds = work_at(curve, digits.TARGET, work="seconds")
        return curve[0].samples / seconds if seconds else None

    upstream, adaptive, fitted = (rate(name) for name in (digits.UPSTREAM, "UniPC-4 adaptive", digits.FITTED))

    def number(value: float | None) -> str:
        return f"{value:.0f}" if value else ABSENT

    def times(value: float | None) -> str:
        return f"{value / upstream:.1f}" if value and upstream else ABSENT

    return paragraph(
        f"At an RMS error of {scientific(digits.TARGET, 0)} the calibrated grid makes {number(fitted)} digits a second "
        f"and adaptive UniPC {number(adaptive)}, where scipy's RK45 makes {number(upstream)}: {times(fitted)} and "
        f"{times(adaptive)} times as many."
    )


# ---- the demo ----


def demo(folder: Path) -> str:
    found = load(folder, "demo.json")
    seconds, quality = found["seconds"], found["quality"]
    runs = f"the fastest of {len(seconds)} runs" if len(seconds) > 1 else "one run"
    lines = [
        [
            f"{found['samples']} digits by adaptive RK45, rtol = atol = {scientific(found['tolerance'], 0)}",
            f"{found['evaluations']} evaluations of the network; {min(seconds):.1f} s ({runs}), "
            f"{found['samples'] / min(seconds):.0f} digits a second",
        ],
        ["Frechet distance to the training digits, on a small classifier's features", f"{quality['samples']:.2f}"],
        [
            f"the same of held-back real digits (what {quality['images']} perfect samples would get)",
            f"{quality['floor']:.2f}",
        ],
        ["the same of noise", f"{quality['ceiling']:.0f}"],
    ]
    return f"{paragraph(f'{machine(found)}:')}\n\n{record.markdown_table(['', ''], lines)}"


# ---- the page ----

BLOCKS: dict[str, Callable[[Path], str]] = {
    "evaluations for an error": solvers,
    "few evaluations": few_evaluations,
    "speed": speed,
    "end to end": end_to_end,
    "demo": demo,
}


def filled(page: str, folder: Path) -> str:
    """The page with its blocks made anew from the results in ``folder``."""
    names = [block[2] for block in BLOCK.finditer(page)]
    if names != list(BLOCKS):
        raise SystemExit(
            f"README.md: expected the blocks {', '.join(BLOCKS)}, each begun by <!-- measured: NAME --> and ended by "
            f"<!-- end -->; found {', '.join(names) or 'none'}."
        )
    return BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]](folder)}\n<!-- end -->", page)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description="Writes README's measured numbers from benchmarks/results."
    )
    parser.add_argument("--quick", action="store_true", help=f"from {record.REHEARSAL}, into a README.md there")
    quick = parser.parse_args().quick
    folder, target = (record.REHEARSAL, record.REHEARSAL / "README.md") if quick else (record.RESULTS, README)
    target.write_text(filled(README.read_text(), folder))
    print(f"Written to {target}")


if __name__ == "__main__":
    main()

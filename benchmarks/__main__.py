"""Speed beside what people use in its place: ``python -m benchmarks``

Every competitor runs in a process of its own, and they take turns, forwards and backwards, so that what else the
machine does meets all of them. First it is checked that all compute the same thing. Writes into
``benchmarks/results``: ``speed.csv`` and ``digits.csv`` have all numbers, ``speed.md`` the tables (also printed),
``speed.json`` machine, versions and summary, and the plots ``speed.png``, ``sizes.png`` and ``digits.png``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from . import digits, plots_speed, record
from .cases import BY_SIZE, CASES, COPY, Case, Measured, Shape
from .work_precision import work_at
from .worker import Worker

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


class Effort(NamedTuple):
    """Turns of each competitor, seconds of a turn, numbers of threads, samples of the digits."""

    turns: int
    seconds: float
    threads: tuple[int, ...]
    samples: int


FULL = Effort(turns=6, seconds=0.2, threads=(1, 2), samples=2048)
QUICK = Effort(turns=2, seconds=0.05, threads=(1,), samples=96)


class Workers(dict[str, Worker]):
    """By competitor. They start side by side, which takes seconds, while who asks does something else."""

    def __init__(self, competitors: Iterable[str], threads: int) -> None:
        super().__init__({name: Worker(name, threads) for name in dict.fromkeys(competitors)})

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.values():
            worker.stop()


def competitors_of(case: Case) -> list[str]:
    return [*case.competitors, *([COPY] if case.name == BY_SIZE else [])]


def check(case: Case, shape: Shape, started: Workers) -> None:
    """All competitors compute what the first does, from the same random numbers."""
    values = {name: started[name].check(case.name, shape) for name in case.competitors}
    wanted = values[case.baseline]
    for name, got in values.items():
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        if not error <= case.tolerance:
            raise SystemExit(
                f"{case.name} {shape}: {name} differs from {case.baseline} by {error:.1e} of the largest value, "
                f"{case.tolerance:g} is allowed: nothing is timed."
            )


def measure(case: Case, shape: Shape, effort: Effort, threads: int, started: Workers) -> list[Measured]:
    names = competitors_of(case)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(effort.turns):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            times[name] += started[name].seconds(case.name, shape, effort.seconds)
    peaks = case.name == "loss step" and threads == 1
    return [
        Measured(
            case.name, shape, threads, name, case.unit, min(all_times), *np.quantile(all_times, (0.1, 0.5, 0.9)),
            len(all_times), started[name].peak_bytes(case.name, shape) if peaks else None,
        )
        for name, all_times in times.items()
    ]  # fmt: skip


def measure_all(effort: Effort, quick: bool) -> list[Measured]:
    todo = [
        (case, shape, threads)
        for threads in effort.threads
        for case in CASES.values()
        for shape in (case.quick_shapes if quick else case.shapes)
    ]
    measured = []
    with tqdm(todo, unit="case") as bar:
        for threads, these in itertools.groupby(bar, key=lambda item: item[2]):
            names = (name for case in CASES.values() for name in competitors_of(case))
            with Workers(names, threads) as started:
                for case, shape, _ in these:
                    bar.set_description(f"{case.name} {shape}, {threads} threads")
                    check(case, shape, started)
                    measured += measure(case, shape, effort, threads, started)
    return measured


def sample_digits(effort: Effort, quick: bool) -> list[digits.Timed]:
    """Each sampler in its process, one setting after the other in turn."""
    points = []
    with Workers(digits.SAMPLERS, max(effort.threads)) as started:
        wanted = digits.exact(effort.samples).numpy()
        settings = {name: digits.settings_of(name, quick) for name in digits.SAMPLERS}
        todo = [p for row in itertools.zip_longest(*([(n, s) for s in v] for n, v in settings.items())) for p in row]
        for name, setting in tqdm([p for p in todo if p], desc="digits", unit="run"):
            points.append(started[name].sample(setting, effort.samples, wanted))
    return points


# ---- tables ----


def ratios(measured: Sequence[Measured], statistic: str) -> dict[tuple[str, Shape, int, str], float]:
    """How many times as fast as the baseline of the case."""
    found = {(m.case, m.shape, m.threads, m.competitor): getattr(m, statistic) for m in measured}
    return {
        (case, shape, threads, name): found[case, shape, threads, CASES[case].baseline] / value
        for (case, shape, threads, name), value in found.items()
    }


def seconds_text(value: float) -> str:
    scale, unit = next(((scale, unit) for scale, unit in UNITS if value >= scale), UNITS[-1])
    return f"{value / scale:.3g} {unit}"


def speed_table(measured: Sequence[Measured]) -> str:
    best, median = ratios(measured, "best"), ratios(measured, "median")
    lines = [
        [
            m.case, " x ".join(map(str, m.shape)), str(m.threads), m.competitor, f"{seconds_text(m.best)}",
            seconds_text(m.median), f"{seconds_text(m.q10)} to {seconds_text(m.q90)}",
            f"{best[m.case, m.shape, m.threads, m.competitor]:.2f}",
            f"{median[m.case, m.shape, m.threads, m.competitor]:.2f}",
            "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.2f}",
        ]
        for m in measured
    ]  # fmt: skip
    header = ["case", "size", "threads", "competitor", "best", "median", "10 to 90 %", "speed-up, best", "median",
              "peak MiB"]  # fmt: skip
    text = "Time of a step, or of an evaluation outside the network (likelihood: with it)."
    return f"{text}\n\n{record.markdown_table(header, lines)}"


def digits_table(points: Sequence[digits.Timed]) -> str:
    baseline = work_at([p for p in points if p.sampler == digits.UPSTREAM], digits.TARGET, work="seconds")
    lines = []
    for name in dict.fromkeys(p.sampler for p in points):
        curve = [p for p in points if p.sampler == name]
        found = work_at(curve, digits.TARGET, work="seconds")
        lines.append([
            name,
            ", ".join(f"{p.seconds:.2f} s: {p.rms:.1e}" for p in curve),
            "not reached" if found is None else f"{curve[0].samples / found:.0f}",
            f"{baseline / found:.2f}" if found and baseline else "",
        ])  # fmt: skip
    header = ["sampler", "seconds: RMS error", f"samples a second at {digits.TARGET:g}", "times upstream's"]
    return f"{points[0].samples} digits, end to end.\n\n{record.markdown_table(header, lines)}"


def write(folder: Path, measured: Sequence[Measured], points: Sequence[digits.Timed]) -> None:
    tables = f"{speed_table(measured)}\n\n{digits_table(points)}"
    print(f"\n{tables}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.md").write_text(tables + "\n")
    rows: list[dict[str, Any]] = [{**asdict(m), "shape": "x".join(map(str, m.shape))} for m in measured]
    record.write_csv(folder / "speed.csv", rows)
    record.write_csv(folder / "digits.csv", [asdict(p) for p in points])
    best = {" / ".join(map(str, key)): value for key, value in ratios(measured, "best").items()}
    record.write_json(folder / "speed.json", {"benchmark": "speed", "speed-up by best times": best})
    plots_speed.bars(folder / "speed.png", measured)
    plots_speed.sizes(folder / "sizes.png", [m for m in measured if m.case == BY_SIZE])
    plots_speed.error_against_seconds(folder / "digits.png", points, digits.TARGET)
    print(f"\nWritten to {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed beside what people use instead.")
    record.add_options(parser, "fewer sizes, samples and turns: under two minutes")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="these cases alone, printed and not written")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads; default: 1 and 2, --quick: 1")
    args = parser.parse_args()
    effort = QUICK if args.quick else FULL
    if args.threads:
        effort = effort._replace(threads=tuple(args.threads))
    if args.cases:
        for name in set(CASES) - set(args.cases):
            del CASES[name]
        print(speed_table(measure_all(effort, args.quick)))
        return
    torch.set_num_threads(max(effort.threads))
    measured = measure_all(effort, args.quick)
    write(record.folder_of(args), measured, sample_digits(effort, args.quick))


if __name__ == "__main__":
    main()

"""Explicit Runge-Kutta methods, as data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i is ``y + h sum_j a[i][j] k_j`` at ``t + c[i] h``; the step is ``y + h
    sum_j b[j] k_j``.

    Adaptive methods evaluate once more at the new point, which is the first slope of the next step; ``errors`` are
    coefficients of the error estimates over all slopes, that one included (one row, or two that are
    combined as DOP853's), and ``error_order`` is the order of the estimate. ``dense`` gives the state within a step,
    ``y(t + theta h) = y + h sum_j k_j sum_m dense[j][m] theta^(m + 1)``; without it, the cubic through both ends.

    Raises:
        ValueError: the parts do not fit together.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    errors: tuple[tuple[float, ...], ...] = ()
    error_order: int = 0
    dense: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        n = len(self.b)
        if n < 1 or len(self.c) != n or [len(row) for row in self.a] != list(range(n)):
            raise ValueError(f"a, b, c: expected rows of 0 to {n - 1} numbers in a, and {n} in b and c each.")
        if len(self.errors) > 2 or any(len(row) != n + 1 for row in self.errors):
            raise ValueError(f"errors: expected at most two rows of {n + 1} numbers, one a slope.")

    @functools.cached_property
    def passing(self) -> frozenset[int]:
        """The stages after the first whose slopes only other stages take: no result has a weight for them."""
        results = (self.b, *self.errors, *zip(*self.dense, strict=True))
        return frozenset(i for i in range(1, len(self.b)) if not any(weights[i] for weights in results))


EULER = Tableau(a=((),), b=(1.0,), c=(0.0,), order=1)
MIDPOINT = Tableau(a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2), order=2)
HEUN = Tableau(a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0), order=2)
RK4 = Tableau(
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), c=(0.0, 1 / 2, 1 / 2, 1.0), order=4
)
# Bogacki and Shampine 1989
RK23 = Tableau(
    a=((), (1 / 2,), (0.0, 3 / 4)),
    b=(2 / 9, 1 / 3, 4 / 9),
    c=(0.0, 1 / 2, 3 / 4),
    order=3,
    errors=((5 / 72, -1 / 12, -1 / 9, 1 / 8),),
    error_order=2,
)
# Dormand and Prince 1980
RK45 = Tableau(
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    order=5,
    errors=((-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40),),
    error_order=4,
    dense=(  # Shampine 1986, "Some practical Runge-Kutta formulas"
        (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
)


def _dop853() -> Tableau:
    """Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section II.10; the numbers are scipy's."""
    from scipy.integrate import DOP853  # imported here: it takes longer than the rest of the package

    return Tableau(
        a=tuple(tuple(DOP853.A[i, :i].tolist()) for i in range(DOP853.n_stages)),
        b=tuple(DOP853.B.tolist()),
        c=tuple(DOP853.C[: DOP853.n_stages].tolist()),
        order=8,
        errors=(tuple(DOP853.E5.tolist()), tuple(DOP853.E3.tolist())),
        error_order=7,
    )


METHODS: dict[str, Tableau | Callable[[], Tableau]] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun": HEUN,
    "rk4": RK4,
    "RK23": RK23,
    "RK45": RK45,
    "DOP853": _dop853,
}
ADAPTIVE = ("RK23", "RK45", "DOP853")


def tableau_of(method: str | Tableau) -> Tableau:
    """The method of that name, or the user's own."""
    if isinstance(method, Tableau):
        return method
    found = METHODS[method]
    return found if isinstance(found, Tableau) else found()

"""Step-size control: the number of network evaluations is upstream's, over all recorded ODE and likelihood cases."""

import pytest
from golden import cases, rounding
from golden.solves import likelihood_of, sample_by_ode

CASES = [(section, name) for section in ("ode", "likelihood") for name in cases(section)]


def nfe_of(section: str, name: str) -> int:
    return sample_by_ode(name)[1] if section == "ode" else likelihood_of(name)[2]


@pytest.mark.parametrize(("section", "name"), CASES)
def test_nfe_is_within_one_attempted_step(section: str, name: str) -> None:
    """Where rounding decides whether a step is accepted, upstream's own nfe takes any value of the list."""
    stages = {"RK45": 6, "RK23": 3}[cases(section)[name]["method"]]
    possible = rounding(section)[name]["nfe"]
    nfe = nfe_of(section, name)
    assert min(possible) - stages <= nfe <= max(possible) + stages
    assert (nfe - 2) % stages == 0


def test_nfe_is_upstreams_in_95_percent_of_the_cases() -> None:
    strangers = {
        name: nfe for section, name in CASES if (nfe := nfe_of(section, name)) not in rounding(section)[name]["nfe"]
    }
    assert len(strangers) <= 0.05 * len(CASES), strangers

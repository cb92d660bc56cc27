"""What scoresde_ext is measured against, in readable eager torch: the formulas of score_sde_pytorch, written anew from
the paper, and the ODE solvers of scipy, torchdiffeq and torchode on the same drift. ``tests/test_benchmarks.py``
compares them with what score_sde_pytorch returned."""

from .formulas import SDES, VE, VP, Formulas, SubVP, flow_drift
from .integrators import scipy_rk45, torchdiffeq_dopri5, torchode_dopri5
from .karras import dpmpp_2m, vp_denoiser
from .likelihood import likelihood
from .steps import euler_maruyama, langevin, score_matching_loss

__all__ = [
    "SDES",
    "VE",
    "VP",
    "Formulas",
    "SubVP",
    "dpmpp_2m",
    "euler_maruyama",
    "flow_drift",
    "langevin",
    "likelihood",
    "scipy_rk45",
    "score_matching_loss",
    "torchdiffeq_dopri5",
    "torchode_dopri5",
    "vp_denoiser",
]

"""A program's own likelihood, with upstream's interface."""

import math

import numpy as np
import torch
from models import utils as mutils
from models.utils import from_flattened_numpy, to_flattened_numpy
from scipy import integrate


def get_likelihood_fn(sde, inverse_scaler, hutchinson_type="Rademacher", rtol=1e-5, atol=1e-5, method="RK45", eps=1e-5):
    assert hutchinson_type == "Gaussian"

    def likelihood_fn(model, data):
        epsilon, shape, n = torch.randn_like(data), data.shape, data[0].numel()

        def drift(x, t):
            score_fn = mutils.get_score_fn(sde, model, train=False, continuous=True)
            return sde.reverse(score_fn, probability_flow=True).sde(x, t)[0]

        def both(t, flat):
            x = from_flattened_numpy(flat[: -shape[0]], shape).to(data.device, torch.float32).requires_grad_(True)
            times = torch.ones(shape[0], device=data.device) * t
            with torch.enable_grad():
                slope = drift(x, times)
                (product,) = torch.autograd.grad((slope * epsilon).sum(), x)
            divergence = (product * epsilon).sum(dim=(1, 2, 3))
            return np.concatenate([to_flattened_numpy(slope), to_flattened_numpy(divergence)])

        start = np.concatenate([to_flattened_numpy(data), np.zeros(shape[0])])
        solution = integrate.solve_ivp(both, (eps, sde.T), start, rtol=rtol, atol=atol, method=method)
        end = torch.tensor(solution.y[:, -1], dtype=torch.float32)
        z, delta = end[: -shape[0]].reshape(shape), end[-shape[0] :]
        bpd = -(sde.prior_logp(z) + delta) / n / math.log(2) + 7.0 - inverse_scaler(-1.0)
        return bpd, z, solution.nfev

    return likelihood_fn

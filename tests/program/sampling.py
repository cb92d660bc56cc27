"""A program's own samplers, with upstream's interface."""

import functools
import math

import sde_lib
import torch
from models import utils as mutils
from models.utils import from_flattened_numpy, get_score_fn, to_flattened_numpy
from scipy import integrate


def rows(c):
    return c[:, None, None, None]


class Predictor:
    def __init__(self, sde, score_fn, probability_flow=False):
        self.sde, self.score_fn, self.rsde = sde, score_fn, sde.reverse(score_fn, probability_flow)


class EulerMaruyamaPredictor(Predictor):
    def update_fn(self, x, t):
        dt = -1.0 / self.rsde.N
        z = torch.randn_like(x)
        drift, diffusion = self.rsde.sde(x, t)
        x_mean = x + drift * dt
        return x_mean + rows(diffusion) * math.sqrt(-dt) * z, x_mean


class ReverseDiffusionPredictor(Predictor):
    def update_fn(self, x, t):
        f, G = self.rsde.discretize(x, t)
        x_mean = x - f
        return x_mean + rows(G) * torch.randn_like(x), x_mean


class AncestralSamplingPredictor(Predictor):
    def __init__(self, sde, score_fn, probability_flow=False):
        super().__init__(sde, score_fn, probability_flow)
        if not isinstance(sde, (sde_lib.VPSDE, sde_lib.VESDE)):
            raise NotImplementedError(type(sde).__name__)

    def index(self, t):
        return (t * (self.sde.N - 1) / self.sde.T).long()

    def vpsde_update_fn(self, x, t):
        beta = self.sde.discrete_betas[self.index(t)]
        x_mean = (x + rows(beta) * self.score_fn(x, t)) / rows((1.0 - beta).sqrt())
        return x_mean + rows(beta.sqrt()) * torch.randn_like(x), x_mean

    def vesde_update_fn(self, x, t):
        sigma = self.sde.discrete_sigmas[self.index(t)]
        below = torch.where(self.index(t) == 0, torch.zeros_like(t), self.sde.discrete_sigmas[self.index(t) - 1])
        gain = sigma**2 - below**2
        x_mean = x + rows(gain) * self.score_fn(x, t)
        return x_mean + rows((below**2 * gain / sigma**2).sqrt()) * torch.randn_like(x), x_mean

    def update_fn(self, x, t):
        return self.vesde_update_fn(x, t) if isinstance(self.sde, sde_lib.VESDE) else self.vpsde_update_fn(x, t)


class NonePredictor:
    def __init__(self, sde, score_fn, probability_flow=False):
        pass

    def update_fn(self, x, t):
        return x, x


class LangevinCorrector:
    def __init__(self, sde, score_fn, snr, n_steps):
        if not isinstance(sde, (sde_lib.VPSDE, sde_lib.subVPSDE, sde_lib.VESDE)):
            raise NotImplementedError(type(sde).__name__)
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps

    def update_fn(self, x, t):
        alpha = torch.ones_like(t)
        if not isinstance(self.sde, sde_lib.VESDE):
            alpha = self.sde.alphas[(t * (self.sde.N - 1) / self.sde.T).long()]
        for _ in range(self.n_steps):
            score, z = self.score_fn(x, t), torch.randn_like(x)
            norms = [a.reshape(len(a), -1).norm(dim=-1).mean() for a in (z, score)]
            step = 2 * alpha * (self.snr * norms[0] / norms[1]) ** 2
            x_mean = x + rows(step) * score
            x = x_mean + rows((2 * step).sqrt()) * z
        return x, x_mean


class NoneCorrector:
    def __init__(self, sde, score_fn, snr, n_steps):
        pass

    def update_fn(self, x, t):
        return x, x


def get_predictor(name):
    return {
        "euler_maruyama": EulerMaruyamaPredictor,
        "reverse_diffusion": ReverseDiffusionPredictor,
        "ancestral_sampling": AncestralSamplingPredictor,
        "none": NonePredictor,
    }[name]


def get_corrector(name):
    return {"langevin": LangevinCorrector, "none": NoneCorrector}[name]


def shared_predictor_update_fn(x, t, sde, model, predictor, probability_flow, continuous):
    score_fn = mutils.get_score_fn(sde, model, train=False, continuous=continuous)
    return (predictor or NonePredictor)(sde, score_fn, probability_flow).update_fn(x, t)


def shared_corrector_update_fn(x, t, sde, model, corrector, continuous, snr, n_steps):
    score_fn = mutils.get_score_fn(sde, model, train=False, continuous=continuous)
    return (corrector or NoneCorrector)(sde, score_fn, snr, n_steps).update_fn(x, t)


def get_pc_sampler(
    sde, shape, predictor, corrector, inverse_scaler, snr, n_steps=1, probability_flow=False, continuous=False,
    denoise=True, eps=1e-3, device="cuda",
):  # fmt: skip
    correct = functools.partial(
        shared_corrector_update_fn, sde=sde, corrector=corrector, continuous=continuous, snr=snr, n_steps=n_steps
    )
    predict = functools.partial(
        shared_predictor_update_fn, sde=sde, predictor=predictor, probability_flow=probability_flow,
        continuous=continuous,
    )  # fmt: skip

    @torch.no_grad()
    def sampler(model):
        x = sde.prior_sampling(shape).to(device)
        for t in torch.linspace(sde.T, eps, sde.N, device=device):
            times = torch.ones(shape[0], device=device) * t
            x, _ = correct(x, times, model=model)
            x, x_mean = predict(x, times, model=model)
        return inverse_scaler(x_mean if denoise else x), sde.N * (n_steps + 1)

    return sampler


def get_ode_sampler(
    sde, shape, inverse_scaler, denoise=False, rtol=1e-5, atol=1e-5, method="RK45", eps=1e-3, device="cuda"
):
    @torch.no_grad()
    def sampler(model, z=None):
        x = sde.prior_sampling(shape).to(device) if z is None else z

        def drift(t, flat):
            score_fn = get_score_fn(sde, model, train=False, continuous=True)
            state = from_flattened_numpy(flat, shape).to(device, torch.float32)
            times = torch.ones(shape[0], device=device) * t
            return to_flattened_numpy(sde.reverse(score_fn, probability_flow=True).sde(state, times)[0])

        solution = integrate.solve_ivp(drift, (sde.T, eps), to_flattened_numpy(x), rtol=rtol, atol=atol, method=method)
        x = torch.tensor(solution.y[:, -1]).reshape(shape).to(device, torch.float32)
        if denoise:
            score_fn = get_score_fn(sde, model, train=False, continuous=True)
            times = torch.full((shape[0],), eps, device=device)
            _, x = ReverseDiffusionPredictor(sde, score_fn).update_fn(x, times)
        return inverse_scaler(x), solution.nfev

    return sampler

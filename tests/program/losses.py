"""A program's own losses, with upstream's interface."""

import torch
from models import utils as mutils
from sde_lib import VESDE, VPSDE


def rows(c):
    return c[:, None, None, None]


def per_sample(squares, reduce_mean):
    flat = squares.reshape(len(squares), -1)
    return flat.mean(1) if reduce_mean else 0.5 * flat.sum(1)


def get_sde_loss_fn(sde, train, reduce_mean=True, continuous=True, likelihood_weighting=True, eps=1e-5):
    def loss_fn(model, batch):
        score_fn = mutils.get_score_fn(sde, model, train=train, continuous=continuous)
        t = torch.rand(batch.shape[0], device=batch.device) * (sde.T - eps) + eps
        z = torch.randn_like(batch)
        mean, std = sde.marginal_prob(batch, t)
        score = score_fn(mean + rows(std) * z, t)
        if likelihood_weighting:
            g = sde.sde(torch.zeros_like(batch), t)[1]
            return (per_sample((score + z / rows(std)) ** 2, reduce_mean) * g**2).mean()
        return per_sample((score * rows(std) + z) ** 2, reduce_mean).mean()

    return loss_fn


def get_smld_loss_fn(vesde, train, reduce_mean=False):
    assert isinstance(vesde, VESDE)

    def loss_fn(model, batch):
        labels = torch.randint(0, vesde.N, (batch.shape[0],), device=batch.device)
        sigma = vesde.discrete_sigmas.flip(0)[labels]
        z = torch.randn_like(batch)
        score = mutils.get_model_fn(model, train=train)(batch + rows(sigma) * z, labels)
        return per_sample((rows(sigma) * score + z) ** 2, reduce_mean).mean()

    return loss_fn


def get_ddpm_loss_fn(vpsde, train, reduce_mean=True):
    assert isinstance(vpsde, VPSDE)

    def loss_fn(model, batch):
        labels = torch.randint(0, vpsde.N, (batch.shape[0],), device=batch.device)
        m, s = vpsde.sqrt_alphas_cumprod[labels], vpsde.sqrt_1m_alphas_cumprod[labels]
        z = torch.randn_like(batch)
        out = mutils.get_model_fn(model, train=train)(rows(m) * batch + rows(s) * z, labels)
        return per_sample((out - z) ** 2, reduce_mean).mean()

    return loss_fn

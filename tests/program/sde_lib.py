"""A program's own SDEs: upstream's classes, attributes and formulas, for images (B, C, H, W), in plain torch."""

import math

import torch


def images(c):
    return c[:, None, None, None]


def dot(x):
    return (x**2).sum(dim=(1, 2, 3))


class SDE:
    T = 1

    def __init__(self, N):
        self.N = N

    def discretize(self, x, t):
        drift, diffusion = self.sde(x, t)
        return drift / self.N, diffusion / math.sqrt(self.N)

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        return -0.5 * (z[0].numel() * math.log(2 * math.pi) + dot(z))

    def reverse(self, score_fn, probability_flow=False):
        return Reverse(self, score_fn, probability_flow)


class Reverse:
    def __init__(self, forward, score_fn, probability_flow):
        self.forward, self.score_fn, self.probability_flow = forward, score_fn, probability_flow
        self.N, self.T = forward.N, forward.T

    def against(self, score, drift, diffusion):
        return drift - images(diffusion) ** 2 * score * (0.5 if self.probability_flow else 1.0)

    def sde(self, x, t):
        drift, diffusion = self.forward.sde(x, t)
        return self.against(self.score_fn(x, t), drift, diffusion), 0.0 if self.probability_flow else diffusion

    def discretize(self, x, t):
        f, G = self.forward.discretize(x, t)
        return self.against(self.score_fn(x, t), f, G), torch.zeros_like(G) if self.probability_flow else G


class BetaSDE(SDE):
    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(N)
        self.beta_0, self.beta_1 = beta_min, beta_max

    def log_mean(self, t):
        return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def beta(self, t):
        return self.beta_0 + t * (self.beta_1 - self.beta_0)


class VPSDE(BetaSDE):
    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(beta_min, beta_max, N)
        self.discrete_betas = torch.linspace(beta_min / N, beta_max / N, N)
        self.alphas = 1.0 - self.discrete_betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_1m_alphas_cumprod = (1.0 - self.alphas_cumprod).sqrt()

    def sde(self, x, t):
        return -0.5 * images(self.beta(t)) * x, self.beta(t).sqrt()

    def marginal_prob(self, x, t):
        return images(self.log_mean(t).exp()) * x, (1.0 - (2.0 * self.log_mean(t)).exp()).sqrt()

    def discretize(self, x, t):
        beta = self.discrete_betas[(t * (self.N - 1) / self.T).long()]
        return images((1.0 - beta).sqrt()) * x - x, beta.sqrt()


class subVPSDE(BetaSDE):
    def sde(self, x, t):
        discount = 1.0 - (4.0 * self.log_mean(t)).exp()
        return -0.5 * images(self.beta(t)) * x, (self.beta(t) * discount).sqrt()

    def marginal_prob(self, x, t):
        return images(self.log_mean(t).exp()) * x, 1.0 - (2.0 * self.log_mean(t)).exp()


class VESDE(SDE):
    def __init__(self, sigma_min=0.01, sigma_max=50, N=1000):
        super().__init__(N)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.discrete_sigmas = torch.linspace(math.log(sigma_min), math.log(sigma_max), N).exp()

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x, t):
        return torch.zeros_like(x), self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def marginal_prob(self, x, t):
        return x, self.sigma(t)

    def prior_sampling(self, shape):
        return torch.randn(*shape) * self.sigma_max

    def prior_logp(self, z):
        s2 = self.sigma_max**2
        return -0.5 * (z[0].numel() * math.log(2 * math.pi * s2) + dot(z) / s2)

    def discretize(self, x, t):
        index = (t * (self.N - 1) / self.T).long()
        below = torch.where(index == 0, torch.zeros_like(t), self.discrete_sigmas[index - 1])
        return torch.zeros_like(x), (self.discrete_sigmas[index] ** 2 - below**2).sqrt()


class ConstantSDE(SDE):
    """An SDE that this program added: beta is always 2. Only its own get_score_fn knows what its networks return."""

    def sde(self, x, t):
        return -x, torch.full_like(t, math.sqrt(2))

    def marginal_prob(self, x, t):
        return images((-t).exp()) * x, (1.0 - (-2.0 * t).exp()).sqrt()

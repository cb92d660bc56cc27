"""A program's own score functions: upstream's convention, with the factors that programs change."""

import sde_lib
import torch

LARGEST_LABEL = 999
OUTPUT_SCALE = 1.0
_MODELS = {}


def register_model(cls):
    _MODELS[cls.__name__] = cls
    return cls


def images(c):
    return c[:, None, None, None]


def get_model_fn(model, train=False):
    def model_fn(x, labels):
        model.train(train)
        return OUTPUT_SCALE * model(x, labels)

    return model_fn


def get_score_fn(sde, model, train=False, continuous=False):
    model_fn = get_model_fn(model, train)

    def of_noise(x, t):
        if continuous or isinstance(sde, sde_lib.subVPSDE):
            out, std = model_fn(x, t * LARGEST_LABEL), sde.marginal_prob(torch.zeros_like(x), t)[1]
        else:
            labels = t * (sde.N - 1)
            out, std = model_fn(x, labels), sde.sqrt_1m_alphas_cumprod[labels.long()]
        return -out / images(std)

    def of_score(x, t):
        if continuous:
            return model_fn(x, sde.marginal_prob(torch.zeros_like(x), t)[1])
        return model_fn(x, torch.round((sde.T - t) * (sde.N - 1)).long())

    if isinstance(sde, (sde_lib.VPSDE, sde_lib.subVPSDE)):
        return of_noise
    if isinstance(sde, sde_lib.VESDE):
        return of_score
    if type(sde).__name__ == "ConstantSDE":
        return lambda x, t: -model_fn(x, 77.0 * t)
    raise NotImplementedError(f"no score function for {type(sde).__name__}")


def to_flattened_numpy(x):
    return x.detach().cpu().numpy().reshape(-1)


def from_flattened_numpy(x, shape):
    return torch.from_numpy(x.reshape(shape))

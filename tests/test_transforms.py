"""torch.func transforms and forward mode, of everything a user differentiates.

Right values come from plain torch: the formula of each function, and its Jacobian by reverse mode.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from scoresde_ext import losses, noise, ops, reference, sampling, sde_lib
from scoresde_ext.models import utils as mutils
from scoresde_ext.ops import Draw

N = 10
SDES = {
    "vp": sde_lib.VPSDE(0.1, 5.0, N),
    "subvp": sde_lib.subVPSDE(0.1, 5.0, N),
    "ve": sde_lib.VESDE(0.1, 5.0, N),
}
B, D = 2, 3
Arguments = tuple[Tensor, Tensor, Tensor]  # x (B, D), t (B,) and the network's weights (D, D)
Function = Callable[[Tensor, Tensor, Tensor], Tensor]

torch.manual_seed(3)
Z, Z2, OUT = (torch.randn(B, D, dtype=torch.float64) for _ in range(3))
U = torch.rand(B, dtype=torch.float64)


def arguments() -> Arguments:
    x, w = torch.randn(B, D), torch.randn(D, D)
    return x.double(), torch.tensor([0.35, 0.72]).double(), w.double()


def network(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, labels: torch.tanh(x @ w) + torch.sin(0.01 * labels.to(x.dtype))[:, None]


def together(*results: Any) -> Tensor:
    return torch.cat([r.flatten() for r in results])


# ---- functions, and their formulas in plain torch ----


def score_fn(kind: str, w: Tensor) -> mutils.ScoreFunction:
    return mutils.get_score_fn(SDES[kind], network(w), continuous=True)


def plain_score(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    s = SDES[kind].marginal_coefficients(t)[1]
    return network(w)(x, s) if kind == "ve" else -network(w)(x, 999 * t) / s[:, None]


def drift(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return together(*SDES[kind].sde(x, t))


def plain_drift(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    f, g = SDES[kind].sde_coefficients(t)
    return together(f[:, None] * x, g)


def discretize(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return together(*SDES[kind].discretize(x, t))


def plain_discretize(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    f, g = SDES[kind].discrete_coefficients(t)
    return together(f[:, None] * x, g)


def marginal(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return together(*SDES[kind].marginal_prob(x, t))


def plain_marginal(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    m, s = SDES[kind].marginal_coefficients(t)
    return together(m[:, None] * x, s)


def score(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return score_fn(kind, w)(x, t).flatten()


def reverse(flow: bool) -> Any:
    def drifts(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        rsde = SDES[kind].reverse(score_fn(kind, w), flow)
        return together(rsde.sde(x, t)[0], *rsde.discretize(x, t))

    def plain(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        half, s = 0.5 if flow else 1.0, plain_score(kind, x, t, w)
        (f, g), (step, noise) = SDES[kind].sde_coefficients(t), SDES[kind].discrete_coefficients(t)
        parts = [c[:, None] * x - half * k[:, None] ** 2 * s for c, k in ((f, g), (step, noise))]
        return together(*parts, torch.zeros_like(noise) if flow else noise)

    return drifts, plain


def update(name: str) -> Function:
    """A predictor's or corrector's step."""

    def step(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        if name in ("langevin", "ald"):
            one: Any = sampling.get_corrector(name)(SDES[kind], score_fn(kind, w), 0.16, 2)
        else:
            one = sampling.get_predictor(name)(SDES[kind], score_fn(kind, w))
        with noise.replay([Z, Z2] if name in ("langevin", "ald") else [Z]):
            return together(*one.update_fn(x, t))

    return step


def plain_euler(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    f, g = (c[:, None] for c in SDES[kind].sde_coefficients(t))
    mean = x - (f * x - g**2 * plain_score(kind, x, t, w)) / N
    return together(mean + g * Z / N**0.5, mean)


def plain_reverse_diffusion(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    f, g = (c[:, None] for c in SDES[kind].discrete_coefficients(t))
    mean = x - (f * x - g**2 * plain_score(kind, x, t, w))
    return together(mean + g * Z, mean)


def plain_ancestral(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    if kind == "ve":
        sigma, below = (v[:, None] for v in SDES[kind].adjacent_sigmas(t))
        gain = sigma**2 - below**2
        mean, n = x + gain * plain_score(kind, x, t, w), (below**2 * gain / sigma**2).sqrt()
    else:
        beta = SDES[kind].discrete_beta(t)[:, None]
        mean, n = (x + beta * plain_score(kind, x, t, w)) / (1 - beta).sqrt(), beta.sqrt()
    return together(mean + n * Z, mean)


def plain_corrector(kind: str, x: Tensor, t: Tensor, w: Tensor, langevin: bool) -> Tensor:
    alpha = 1.0 if kind == "ve" else SDES[kind].discrete_alpha(t)
    for z in (Z, Z2):
        s = plain_score(kind, x, t, w)
        if langevin:
            ratio = 0.16 * z.norm(dim=1).mean() / s.norm(dim=1).mean()
        else:
            ratio = 0.16 * SDES[kind].marginal_coefficients(t)[1]
        e = (2 * alpha * ratio**2 * torch.ones_like(t))[:, None]
        mean = x + e * s
        x = mean + (2 * e).sqrt() * z
    return together(x, mean)


def loss(name: str) -> Any:
    weighted, discrete = name == "likelihood", name in ("ddpm", "smld")
    labels = torch.tensor([2, 7])

    def ours(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """Of the data and the weights alone."""
        sde: Any = SDES[kind]
        if discrete:
            make: Any = losses.get_ddpm_loss_fn if name == "ddpm" else losses.get_smld_loss_fn
            loss_fn = make(sde, train=True, reduce_mean=True)
        else:
            loss_fn = losses.get_sde_loss_fn(sde, train=True, likelihood_weighting=weighted, eps=0.1)
        with noise.replay([labels if discrete else U, Z]):
            return loss_fn(network(w), x)[None]

    def plain(kind: str, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        sde: Any = SDES[kind]
        if name == "ddpm":
            m, s = (c.double()[labels][:, None] for c in (sde.sqrt_alphas_cumprod, sde.sqrt_1m_alphas_cumprod))
            return (network(w)(m * x + s * Z, labels) - Z).square().mean()[None]
        if name == "smld":
            sigma = sde.discrete_sigmas.double().flip(0)[labels][:, None]
            return (network(w)(x + sigma * Z, labels) * sigma + Z).square().mean()[None]
        t = 0.1 + 0.9 * U
        (m, s), g = (c[:, None] for c in sde.marginal_coefficients(t)), sde.sde_coefficients(t)[1][:, None]
        residual = plain_score(kind, m * x + s * Z, t, w) * s + Z
        return (residual * (g / s if weighted else 1.0)).square().mean()[None]

    return ours, plain


STEPS: dict[str, tuple[Any, Any]] = {
    "drift": (drift, plain_drift),
    "discretize": (discretize, plain_discretize),
    "marginal_prob": (marginal, plain_marginal),
    "score": (score, lambda *v: plain_score(*v).flatten()),
    "reverse": reverse(False),
    "probability flow": reverse(True),
    "euler_maruyama": (update("euler_maruyama"), plain_euler),
    "reverse_diffusion": (update("reverse_diffusion"), plain_reverse_diffusion),
    "ancestral_sampling": (update("ancestral_sampling"), plain_ancestral),
    "langevin": (update("langevin"), lambda *v: plain_corrector(*v, langevin=True)),
    "ald": (update("ald"), lambda *v: plain_corrector(*v, langevin=False)),
    "loss": loss("plain"),
    "likelihood loss": loss("likelihood"),
}

KEY, IDS = torch.tensor([3, 5]), torch.tensor([4, 2**40])
STREAM = Draw(key=KEY, ids=IDS, draw=2)
GENERATED = reference.noise_normal(KEY, IDS, 2, (B, D)).double()


OPS: dict[str, tuple[Function, Function]] = {
    "affine": (
        lambda x, t, w: ops.affine(x, x.sin(), t, w[0, :1]),
        lambda x, t, w: t[:, None] * x + w[0, 0] * x.sin(),
    ),
    "affine with numbers": (lambda x, t, w: ops.affine(x, x @ w, 0.5, 2), lambda x, t, w: 0.5 * x + 2 * (x @ w)),
    "affine_noise": (
        lambda x, t, w: together(*ops.affine_noise(x, x @ w, t, 0.3, 0.7, Draw(z=w[:2]))),
        lambda x, t, w: together(t[:, None] * x + 0.3 * (x @ w), t[:, None] * x + 0.3 * (x @ w) + 0.7 * w[:2]),
    ),
    "affine_next": (
        lambda x, t, w: ops.affine_next(x, x @ w, 0.4, t, w[0, :2], STREAM),
        lambda x, t, w: 0.4 * x + t[:, None] * (x @ w) + w[0, :2, None] * GENERATED,
    ),
    "perturb": (
        lambda x, t, w: ops.perturb(x, w[0, :2], t, STREAM),
        lambda x, t, w: w[0, :2, None] * x + t[:, None] * GENERATED,
    ),
    "perturb_keeping": (
        lambda x, t, w: ops.perturb_keeping(x, t, 0.5, STREAM)[0],
        lambda x, t, w: t[:, None] * x + 0.5 * GENERATED,
    ),
    "score_loss": (
        lambda x, t, w: ops.score_loss(x @ w, t, 0.7, w[0, :2], Draw(z=w[:2])),
        lambda x, t, w: w[0, :2] * (t[:, None] * (x @ w) + 0.7 * w[:2]).square().sum(1),
    ),
    "score_loss of a stream, in total": (
        lambda x, t, w: ops.score_loss(x @ w, 2.0, -1.0, 0.25, STREAM, total=True)[None],
        lambda x, t, w: 0.25 * (2 * (x @ w) - GENERATED).square().sum()[None],
    ),
    "score_loss of out": (
        lambda x, t, w: ops.score_loss(x, t, None, w[0, :2]),
        lambda x, t, w: w[0, :2] * (t[:, None] * x).square().sum(1),
    ),
    "score_loss of noise": (
        lambda x, t, w: ops.score_loss(x, None, t, 0.5, Draw(z=w[:2])),
        lambda x, t, w: 0.5 * (t[:, None] * w[:2]).square().sum(1),
    ),
    "squares_of_noise": (
        lambda x, t, w: t * ops.squares_of_noise(STREAM, x)[1],
        lambda x, t, w: t * GENERATED.square().sum(1),
    ),
    "combine": (
        lambda x, t, w: together(*ops.combine([x, w[:2]], [[0.5, 1.0], [2.0, -1.0]])),
        lambda x, t, w: together(0.5 * x + w[:2], 2 * x - w[:2]),
    ),
    "combine of coefficients": (
        lambda x, t, w: together(*ops.combine([x, x.sin()], w[:, :2])),
        lambda x, t, w: together(*(c[0] * x + c[1] * x.sin() for c in w[:, :2])),
    ),
    "rk_stage": (
        lambda x, t, w: ops.rk_stage(x, [x @ w, w[:2]], (0.5, -2.0), t),
        lambda x, t, w: x + t[:, None] * (0.5 * (x @ w) - 2 * w[:2]),
    ),
    "rk_drift_stage": (
        lambda x, t, w: together(*ops.rk_drift_stage(x, [w[:2]], (0.5, 2.0), 0.1, x.sin(), x @ w, t, w[0, :2])),
        lambda x, t, w: together(*reference.rk_drift_stage(x, [w[:2]], (0.5, 2.0), 0.1, x.sin(), x @ w, t, w[0, :2])),
    ),
    "rk_last_stage": (
        lambda x, t, w: together(*ops.rk_last_stage(x, [w[:2]], ((0.5, 2.0), (1.0, 3.0)), t, (0.5,), x @ w, 0.3, 2.0)),
        lambda x, t, w: together(
            *reference.rk_last_stage(x, [w[:2]], ((0.5, 2.0), (1.0, 3.0)), t, (0.5,), x @ w, 0.3, 2.0)
        ),
    ),
    "rk_error": (
        lambda x, t, w: ops.rk_error(x, w[:2], [x @ w], (0.5,), t, 1e-1, 1e-1),
        lambda x, t, w: reference.rk_error(x, w[:2], [x @ w], (0.5,), t, 1e-1, 1e-1),
    ),
    "rk_drift_error": (
        lambda x, t, w: together(*ops.rk_drift_error(x, w[:2], [x @ w], (0.5, 2.0), t, x.sin(), None, t, 1e-1, 1e-1)),
        lambda x, t, w: together(
            *reference.rk_drift_error(x, w[:2], [x @ w], (0.5, 2.0), t, x.sin(), None, t, 1e-1, 1e-1)
        ),
    ),
    "rk_control": (
        lambda x, t, w: ops.rk_control(t, x[:, 0] ** 2, torch.tensor([False, False]), -0.2)[1],
        lambda x, t, w: x[:, 0] ** 2 * 0.9 * t**-0.2,
    ),
    "marginal": (
        lambda x, t, w: together(*ops.marginal(t, 0.1, 1.0, "vp", 0.1, 5.0)),
        lambda x, t, w: together(0.1 + 0.9 * t, *SDES["vp"].marginal_coefficients(0.1 + 0.9 * t)),
    ),
    "materialize": (
        lambda x, t, w: x * ops.materialize(STREAM, x) + ops.materialize(Draw(z=w[:2]), x),
        lambda x, t, w: x * GENERATED + w[:2],
    ),
}  # fmt: skip


def functions() -> Iterator[Any]:
    for name, (f, plain) in OPS.items():
        yield pytest.param(f, plain, id=name)
    for kind in SDES:
        discrete = {"vp": {"ddpm loss": loss("ddpm")}, "ve": {"smld loss": loss("smld")}}.get(kind, {})
        for name, pair in {**STEPS, **discrete}.items():
            if (name, kind) != ("ancestral_sampling", "subvp"):
                f, plain = ((lambda *v, f=f, kind=kind: f(kind, *v)) for f in pair)
                yield pytest.param(f, plain, id=f"{kind} {name}")


every_function = pytest.mark.parametrize(("f", "plain"), list(functions()))


def flat(f: Function) -> Callable[[Arguments], Tensor]:
    return lambda v: f(*v).flatten()


# ---- transforms ----


def by_dual_tensors(f: Any, v: Any, tangents: Any) -> Tensor:
    with forward_ad.dual_level():
        result = f(tuple(forward_ad.make_dual(a, b) for a, b in zip(v, tangents, strict=True)))
        tangent = forward_ad.unpack_dual(result).tangent
        return torch.zeros_like(result) if tangent is None else tangent


def directions(v: Arguments) -> Arguments:
    return tuple(torch.cos(7 * a + 1) for a in v)  # type: ignore[return-value]


def pushed(jacobian: Any, tangents: Arguments) -> Tensor:
    return sum(j.flatten(1) @ b.flatten() for j, b in zip(jacobian, tangents, strict=True))


@every_function
def test_first_derivatives(f: Function, plain: Function) -> None:
    v = arguments()
    tangents, g = directions(v), flat(f)
    right, jacobian = flat(plain)(v), torch.autograd.functional.jacobian(lambda *v: flat(plain)(v), v)
    close = torch.testing.assert_close
    close(g(v), right)
    close(pushed(jacobian, tangents), by_dual_tensors(g, v, tangents))
    result, tangent = jvp(g, (v,), (tangents,))
    close(result, right)
    close(tangent, pushed(jacobian, tangents))
    close(jacfwd(g)(v), jacobian)
    close(jacrev(g)(v), jacobian)
    cotangent = torch.sin(3 * right + 1)
    pulled = tuple((cotangent @ j.flatten(1)).reshape(a.shape) for j, a in zip(jacobian, v, strict=True))
    result, pull = vjp(g, v)
    close(result, right)
    close(pull(cotangent)[0], pulled)
    close(grad(lambda v: cotangent @ g(v))(v), pulled)
    leaves = tuple(a.clone().requires_grad_() for a in v)  # and by torch.autograd, as ever
    close(torch.autograd.grad(cotangent @ g(leaves), leaves, materialize_grads=True), pulled)


@every_function
def test_second_derivatives(f: Function, plain: Function) -> None:
    v = arguments()
    right = torch.autograd.functional.hessian(lambda *v: flat(plain)(v).sin().sum(), v)
    torch.testing.assert_close(hessian(lambda v: flat(f)(v).sin().sum())(v), right)
    reverse_twice = jacrev(jacrev(lambda v: flat(f)(v).sin().sum()))(v)
    torch.testing.assert_close(reverse_twice, right)


@every_function
def test_vmap(f: Function, plain: Function) -> None:
    """Values, and gradients one by one, of calls with different arguments."""
    calls = [arguments() for _ in range(3)]
    stacked = tuple(torch.stack(a) for a in zip(*calls, strict=True))
    torch.testing.assert_close(vmap(f)(*stacked), torch.stack([plain(*v) for v in calls]))

    def value(v: Arguments, f: Function) -> Tensor:
        return f(*v).sin().sum()

    leaves = [tuple(a.clone().requires_grad_() for a in v) for v in calls]
    right = [torch.autograd.grad(value(v, plain), v, materialize_grads=True) for v in leaves]
    expected = tuple(torch.stack(g) for g in zip(*right, strict=True))
    torch.testing.assert_close(vmap(grad(lambda v: value(v, f)))(stacked), expected)
    x, t, w = stacked[0].movedim(0, 2), stacked[1], calls[0][2]  # another dimension; weights that all calls share
    some = torch.stack([plain(a, b, w) for a, b, _ in calls])
    torch.testing.assert_close(vmap(f, in_dims=(2, 0, None))(x, t, w), some)


# ---- training: gradients of one sample each, noise ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) + 0.001 * labels[:, None]


LOSSES = {
    "sde": losses.get_sde_loss_fn(SDES["vp"], train=True),
    "ddpm": losses.get_ddpm_loss_fn(SDES["vp"], train=True),
    "smld": losses.get_smld_loss_fn(SDES["ve"], train=True),
}
every_loss = pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
Parameters = dict[str, Tensor]


def training(loss_fn: Any) -> tuple[Net, Parameters, Callable[[Parameters, Tensor], Tensor]]:
    net = Net()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return net, parameters, lambda p, batch: loss_fn(lambda *v: functional_call(net, p, v), batch)


def by_autograd(net: Net, loss: Tensor) -> Parameters:
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums of float32 in another order


@every_loss
def test_gradient_of_the_weights(loss_fn: Any) -> None:
    """With eager mode's noise after torch.manual_seed."""
    net, parameters, value = training(loss_fn)
    batch = torch.randn(5, D)
    torch.manual_seed(1)
    right = by_autograd(net, loss_fn(net, batch))
    for transform in (grad, jacrev, lambda f: jacfwd(f, randomness="same")):
        torch.manual_seed(1)
        close(transform(value)(parameters, batch), right)


@every_loss
def test_gradients_sample_by_sample(loss_fn: Any) -> None:
    """Of streams, so that a loop over the samples has the same noise; also where only the streams differ."""
    net, parameters, value = training(loss_fn)
    batch, ids = torch.randn(4, D), torch.tensor([7, 2**40, 0, 3])

    def one(p: Parameters, x: Tensor, stream: Tensor) -> Tensor:
        with noise.seeds(3, stream[None]):
            return value(p, x[None])

    together = vmap(grad(one), in_dims=(None, 0, 0))(parameters, batch, ids)
    for i in range(len(batch)):
        with noise.seeds(3, ids[i : i + 1]):
            close({n: g[i] for n, g in together.items()}, by_autograd(net, loss_fn(net, batch[i : i + 1])))


@every_loss
def test_randomness_of_vmap(loss_fn: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """vmap says what its calls draw; torch's own error where it was not told."""
    _, parameters, value = training(loss_fn)
    batch = torch.zeros(4, D)

    def values(**options: Any) -> Tensor:
        return vmap(lambda x: value(parameters, x[None]), **options)(batch)

    assert len(values(randomness="different").unique()) == 4
    assert len(values(randomness="same").unique()) == 1
    with pytest.raises(RuntimeError, match="randomness"):
        values()
    with noise.seeds(3, range(1)):  # is not random
        assert len(values().unique()) == 1
    assert "batching rule" not in capfd.readouterr().err  # that torch misses


# Older ones cannot tell whether a network that is a function made within a transform is a module.
compiles_functions_in_functions = pytest.mark.torch("2.9")


@pytest.mark.parametrize("run", ["eager", pytest.param("compiled", marks=compiles_functions_in_functions)])
def test_draws_go_on_after_a_transform(run: str) -> None:
    """The count of a source's draws outlasts the transform that they were made in."""
    net, parameters, value = training(LOSSES["sde"])
    batch = torch.randn(3, D)
    with noise.seeds(3, range(3)):
        right = [by_autograd(net, LOSSES["sde"](net, batch)) for _ in range(3)]
    f = grad(value) if run == "eager" else compiled(grad(value))
    with noise.seeds(3, range(3)):
        close([f(parameters, batch), f(parameters, batch)], right[:2])
        close(by_autograd(net, LOSSES["sde"](net, batch)), right[2])


def test_generated_noise_under_vmap() -> None:
    keys, ids = torch.tensor([[3, 5], [4, 0], [-1, 2]]), torch.arange(12).reshape(3, 4)
    for generate, more in ((ops.noise_normal, ()), (ops.noise_uniform, ()), (ops.noise_integers, (10,))):
        for k, i, dims in ((keys, ids, (0, 0)), (keys[0], ids, (None, 0)), (keys, ids[0], (0, None))):
            got = vmap(lambda k, i, g=generate, m=more: g(k, i, 1, (4, 5), *m), in_dims=dims)(k, i)
            each = zip(k.expand(3, 2), i.expand(3, 4), strict=True)
            assert torch.equal(got, torch.stack([generate(a, b, 1, (4, 5), *more) for a, b in each]))
        alone = vmap(lambda k, g=generate, m=more: g(k, None, 0, (4, 5), *m))(keys)
        assert torch.equal(alone, torch.stack([generate(k, None, 0, (4, 5), *more) for k in keys]))


# ---- what looks at values ----


def test_checks_of_values_see_through_transforms() -> None:
    _, parameters, value = training(LOSSES["sde"])
    batch, bad = torch.randn(3, D), torch.tensor([0.1, 0.2, 1.5])
    batch[1, 2] = float("nan")
    with pytest.raises(ValueError, match="batch: expected finite values"):
        grad(value)(parameters, batch)
    with pytest.raises(ValueError, match="batch: expected finite values"):
        vmap(grad(lambda p, x: value(p, x[None])), in_dims=(None, 0), randomness="different")(parameters, batch)
    x, sde = torch.randn(3, D), SDES["vp"].sde
    with pytest.raises(ValueError, match="t: expected times in"):
        jvp(sde, (x, bad), (x, bad))
    with pytest.raises(ValueError, match="t: expected times in"):
        vmap(sde)(x[:, None], bad[:, None])


@pytest.mark.parametrize("name", ["euler_maruyama", "reverse_diffusion", "ancestral_sampling", "langevin", "ald"])
def test_one_time_for_all_samples(name: str) -> None:
    """Numbers stand for tensors where all times are equal; not where derivatives go through them."""
    x, w = torch.randn(B, D), torch.randn(D, D)
    t, nearly = torch.full((B,), 0.5), torch.tensor([0.5, 0.5 + 1e-7])
    assert nearly[0] != nearly[1]

    def f(x: Tensor, t: Tensor) -> Tensor:
        corrector = name in ("langevin", "ald")
        make: Any = sampling.get_corrector(name) if corrector else sampling.get_predictor(name)
        step = make(SDES["vp"], score_fn("vp", w), *((0.16, 1) if corrector else ()))
        with noise.replay([Z.float()]):
            return step.update_fn(x, t)[0].square().sum()

    right = grad(f, argnums=(0, 1))(x, nearly)
    close(grad(f, argnums=(0, 1))(x, t), right)
    leaves = x.clone().requires_grad_(), t.clone().requires_grad_()
    close(torch.autograd.grad(f(*leaves), leaves), right)
    close(torch.autograd.grad(f(leaves[0], t), leaves[0])[0], right[0])
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(f(x, forward_ad.make_dual(t, torch.ones(B)))).tangent
    close(tangent, right[1].sum())


# ---- torch.compile ----


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


COMPILED: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "grad": grad,
    "jacfwd": lambda f: jacfwd(f, randomness="same"),
    "jvp": lambda f: lambda p, batch: jvp(lambda p: f(p, batch), (p,), (p,)),
    "vmap(grad)": lambda f: vmap(grad(lambda p, x: f(p, x[None])), in_dims=(None, 0), randomness="different"),
}


# torch.compile before 2.13 does not follow jacfwd's own code.
ONLY_NEW = {"jacfwd": pytest.mark.torch("2.13")}


@pytest.mark.parametrize("name", [pytest.param(n, marks=ONLY_NEW.get(n, ())) for n in COMPILED])
@compiles_functions_in_functions
def test_compiled_transforms_of_losses(name: str) -> None:
    for loss_fn in (LOSSES["sde"], LOSSES["smld"]) if name == "vmap(grad)" else (LOSSES["sde"],):
        _, parameters, value = training(loss_fn)
        batch, f = torch.randn(3, D), COMPILED[name](value)
        torch.manual_seed(1)
        right = f(parameters, batch)
        torch.manual_seed(1)
        close(compiled(f)(parameters, batch), right)


@pytest.mark.parametrize("name", ["reverse", "reverse_diffusion"])
@compiles_functions_in_functions
def test_compiled_transforms_of_steps(name: str) -> None:
    def f(*v: Tensor) -> Tensor:
        return STEPS[name][0]("vp", *v)

    v = arguments()
    stacked, tangents = tuple(torch.stack([a, a + 0.01]) for a in v), directions(v)
    if name == "reverse":  # replayed noise is a constant of the graph
        close(compiled(lambda *v: by_dual_tensors(lambda v: f(*v), v, tangents))(*v), jvp(f, v, tangents)[1])
    close(compiled(lambda *v: jvp(f, v, tangents))(*v), jvp(f, v, tangents))
    close(compiled(vmap(f))(*stacked), vmap(f)(*stacked))


# ---- the operators themselves ----


def test_batched_backward() -> None:
    """torch.autograd calls derivatives under vmap where it is given a batch of gradients."""
    x, t, _ = arguments()
    for f in (
        lambda x: together(*ops.affine_noise(x, x.sin(), t, 2.0, 0.3, STREAM)),
        lambda x: ops.score_loss(x.sin(), t, 0.5, 2.0, STREAM),
    ):
        one_by_one = torch.autograd.functional.jacobian(f, x)
        torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True), one_by_one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """As the kernels have it: computed in float32, rounded once."""
    x, out, c = torch.randn(4, 64).to(dtype), torch.randn(4, 64).to(dtype), torch.rand(4)
    for f in (
        lambda: ops.affine(x, out, 1.1, c),
        lambda: ops.affine_noise(x, out, c, 0.3, 0.7, Draw(key=KEY)),
        lambda: ops.rk_stage(x, [out, out], (100.0, -99.9), 0.1),
        lambda: ops.score_loss(300 * x, 1.1, -1.0, 0.5, Draw(z=out)),
    ):
        kernel = f()
        with forward_ad.dual_level():
            plain = f()
        for a, b in zip(torch.utils._pytree.tree_leaves(plain), torch.utils._pytree.tree_leaves(kernel), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=torch.finfo(a.dtype).eps)

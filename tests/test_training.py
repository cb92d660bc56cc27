"""Training steps beside the golden ones: gradients that are not finite, clipping, masks, loss scales, pickling."""

import copy
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_formulas import LOSSES, VE, VP, Decay, coefficients
from torch import Tensor, nn

from scoresde_ext import losses, noise, sde_lib
from scoresde_ext.models.ema import ExponentialMovingAverage

B, D = 8, 6
every_loss = pytest.mark.parametrize("name", LOSSES)


def config(grad_clip: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(
        optim=SimpleNamespace(
            optimizer="Adam", lr=1e-2, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=4, grad_clip=grad_clip
        )
    )


class Net(nn.Module):
    """One layer, the gradient of whose third output is multiplied by ``spoilt``; one parameter is never used."""

    def __init__(self, spoilt: float = 1.0, third: int = 3) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(D, D), nn.Parameter(torch.ones(2))
        self.calls, self.third, self.spoilt = 0, third, spoilt

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        self.x, self.out = x, self.layer(x)
        if self.out.requires_grad:
            self.out.retain_grad()
            if self.calls == self.third:
                self.out.register_hook(lambda gradient: gradient * self.spoilt)
        return self.out


def training_state(model: nn.Module, grad_clip: float = 1.0) -> dict[str, Any]:
    optimizer = losses.get_optimizer(config(grad_clip), model.parameters())
    return {"model": model, "optimizer": optimizer, "ema": ExponentialMovingAverage(model.parameters(), 0.9), "step": 0}


def contents(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of all that a step changes."""
    return copy.deepcopy({key: value if key == "step" else value.state_dict() for key, value in state.items()})


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- gradients that are not finite ------------------------------------------------------------------------------------

spoilt_steps = pytest.mark.parametrize("spoilt", [float("inf"), float("nan")])
clipped_or_not = pytest.mark.parametrize("grad_clip", [1.0, -1.0])


@spoilt_steps
@clipped_or_not
def test_a_gradient_that_is_not_finite_stops_training(grad_clip: float, spoilt: float) -> None:
    """The error names the step; weights, optimizer, averages and the count are those before it."""
    state = training_state(Net(spoilt), grad_clip)
    step_fn = losses.get_step_fn(VP, True, losses.optimization_manager(config(grad_clip)))
    batch = torch.randn(B, D)
    for _ in range(2):
        step_fn(state, batch)
    before = contents(state)
    with pytest.raises(FloatingPointError, match=r"step 2: expected a finite gradient, got one of norm (nan|inf)"):
        step_fn(state, batch)
    assert_same(contents(state), before)
    step_fn(state, batch)
    assert state["step"] == 3


@spoilt_steps
@clipped_or_not
def test_or_the_step_is_skipped(grad_clip: float, spoilt: float) -> None:
    """The warning names the step. It counts, so that a training loop ends; nothing else changes."""
    state = training_state(Net(spoilt), grad_clip)
    step_fn = losses.get_step_fn(VP, True, losses.optimization_manager(config(grad_clip)), on_nonfinite="skip")
    batch = torch.randn(B, D)
    for _ in range(2):
        step_fn(state, batch)
    before = contents(state)
    with pytest.warns(UserWarning, match="Skipped step 2: expected a finite gradient"):
        step_fn(state, batch)
    assert_same(contents(state), before | {"step": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_fn(state, batch)
    after = contents(state)
    assert after["step"] == 4 and after["ema"]["num_updates"] == 3
    assert all(p.isfinite().all() for p in [*state["model"].parameters(), *after["ema"]["shadow_params"]])


@clipped_or_not
def test_a_loss_that_is_nan(grad_clip: float) -> None:
    """A network that returns NaN."""
    state = training_state(Net(), grad_clip)
    with torch.no_grad():
        state["model"].layer.bias.fill_(torch.nan)
    before = contents(state)
    step_fn = losses.get_step_fn(VP, True, losses.optimization_manager(config(grad_clip)))
    with pytest.raises(FloatingPointError, match="step 0"):
        step_fn(state, torch.randn(B, D))
    torch.testing.assert_close(contents(state), before, rtol=0, atol=0, equal_nan=True)


def test_on_nonfinite_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="on_nonfinite: expected one of raise, skip, got 'ignore'"):
        losses.get_step_fn(VP, True, lambda *_, **__: None, on_nonfinite="ignore")


# --- clipping ---------------------------------------------------------------------------------------------------------


def gradients_of(*gradients: Tensor | None) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(3) if g is None else torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = None if g is None else g.clone()
    return parameters


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e6])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16, torch.float32), (torch.float64, torch.complex64)]
)
def test_clipping_is_torchs(dtypes: tuple[torch.dtype, ...], max_norm: float) -> None:
    gradients = [torch.randn(4, 5).to(dtype) for dtype in dtypes]
    ours, torchs = gradients_of(*gradients, None), gradients_of(*gradients, None)
    losses.optimization_manager(config(max_norm))(torch.optim.SGD(ours, lr=0.0), (p for p in ours), step=1)
    torch.nn.utils.clip_grad_norm_(torchs, max_norm)
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)  # torch's norm has those of all gradients
    for a, b in zip(ours[:-1], torchs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2 * rounding, atol=0)
    assert ours[-1].grad is None


def test_the_norm_of_half_precision_gradients_does_not_overflow() -> None:
    """Upstream's clipping makes zeros of these: their norm, 80000, is Inf in float16."""
    (weight,) = parameters = gradients_of(torch.tensor([40000.0, 0.0, 40000.0, 40000.0, 40000.0]).half())
    losses.optimization_manager(config(8.0))(torch.optim.SGD(parameters, lr=0.0), parameters, step=1)
    torch.testing.assert_close(weight.grad, torch.tensor([4.0, 0.0, 4.0, 4.0, 4.0]).half(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [1.0, float("inf")])
def test_sparse_gradients(value: float) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    (table(torch.tensor([1, 1])) * value).sum().backward()
    optimizer, before = torch.optim.SGD(table.parameters(), lr=0.1), table.weight.detach().clone()
    optimize_fn = losses.optimization_manager(config(-1.0))
    if value == 1.0:
        optimize_fn(optimizer, table.parameters(), step=4)
        torch.testing.assert_close(table.weight[1], before[1] - 2 * 0.01)
    else:
        with pytest.raises(FloatingPointError, match="step 4"):
            optimize_fn(optimizer, table.parameters(), step=4)
        assert torch.equal(table.weight, before)


@pytest.mark.parametrize("grad_clip", [0, 0.0, float("nan")])
def test_clipping_to_nothing_is_refused(grad_clip: float) -> None:
    state = training_state(Net())
    step_fn = losses.get_step_fn(VP, True, losses.optimization_manager(config(grad_clip)))
    before = contents(state)
    with pytest.raises(ValueError, match=r"grad_clip: expected a norm above 0, got .*\. For no clipping use -1"):
        step_fn(state, torch.randn(B, D))
    assert_same(contents(state), before)


def test_a_compiled_update_reads_no_norm() -> None:
    """What is traced cannot be read: clipping is torch's there, in one graph up to the optimizer's step."""
    optimize_fn, gradient = losses.optimization_manager(config(1.0)), torch.full((3,), 4.0)
    (weight,) = parameters = gradients_of(gradient)

    class Recorded:
        param_groups: tuple[Any, ...] = ()

        def step(self) -> None:
            pass

    torch.compile(optimize_fn, backend="eager", fullgraph=True)(Recorded(), parameters, 1)
    torch.testing.assert_close(weight.grad, gradient / gradient.norm())


# --- masks ------------------------------------------------------------------------------------------------------------


def draws(name: str, x0: Tensor) -> tuple[Tensor, Tensor]:
    u = torch.randint(1000, (B,)) if name in ("smld", "ddpm") else torch.rand(B).clamp(min=1e-3)
    return u, torch.randn(B, D).to(x0.dtype)


MASKS: dict[str, Tensor] = {
    "bools": torch.rand(B, D, generator=torch.Generator().manual_seed(1)) < 0.5,
    "weights": torch.rand(B, D, generator=torch.Generator().manual_seed(2)) * (torch.arange(D) != 2),
    "integers": (torch.arange(B * D).reshape(B, D) % 3 == 0).long(),
    "samples": (torch.arange(B) < 3)[:, None],
    "elements": (torch.arange(D) != 4)[None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MASKS)
@every_loss
def test_masked_losses(name: str, which: str, dtype: torch.dtype) -> None:
    """Value and gradient are upstream's formula in float64 with weights; what is hidden is never looked at."""
    loss_fn, _, _, mean = LOSSES[name]
    mask, x0, net = MASKS[which], torch.randn(B, D).to(dtype), Net().to(dtype)
    u, z = draws(name, x0)
    with noise.replay([u, z]):
        loss = loss_fn(net, x0.masked_fill(mask == 0, torch.nan), mask)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    m, s, c, d = coefficients(name, u)
    weights = mask.double().expand(B, D)
    weights = weights / weights.sum() if mean else 0.5 / B * weights
    visible = x0.double().masked_fill(mask == 0, 0.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(net.x.double(), m * visible + s * z.double(), rtol=8 * eps, atol=8 * eps)
    r = c * net.out.detach().double() + d * z.double()
    exact = 64 * torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.detach().double(), (weights * r * r).sum(), rtol=exact, atol=0)
    right = 2 * weights * c * r
    bound = max(exact, 2 * eps) * right.abs().max().item()
    torch.testing.assert_close(net.out.grad.double(), right, rtol=0, atol=bound)
    assert (net.out.grad[mask.expand(B, D) == 0] == 0).all()


@every_loss
def test_a_mask_that_hides_nothing(name: str) -> None:
    loss_fn, x0, net = LOSSES[name][0], torch.randn(B, D), Net()
    results = []
    for mask in ((), (torch.ones(B, D),), (torch.ones(B, 1, dtype=torch.bool),)):
        with noise.seeds(1, range(B)):
            loss = loss_fn(net, x0, *mask)
        results.append([loss.detach(), *torch.autograd.grad(loss, [net.layer.weight])])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-6, atol=2e-6 * results[0][1].abs().max().item())


@every_loss
def test_nothing_observed(name: str) -> None:
    """Neither data nor the network's output are looked at: no loss, no gradient."""
    net = Net()
    with torch.no_grad():
        net.layer.bias.fill_(torch.nan)
    loss = LOSSES[name][0](net, torch.full((B, D), torch.inf), torch.zeros(B, D))
    loss.backward()
    assert loss == 0 and (net.out.grad == 0).all()


def test_every_element_counts_the_same() -> None:
    """A long and a short series: the mean is over their 5 + 1 values, not over the means of both."""
    mask = torch.tensor([[1.0] * 5, [1.0, 0, 0, 0, 0]])
    errors = torch.tensor([[1.0] * 5, [4.0] * 5])
    loss_fn = losses.get_ddpm_loss_fn(VP, True)
    with noise.replay([torch.tensor([3, 5]), torch.zeros(2, 5)]):
        assert loss_fn(lambda x, labels: errors, torch.zeros(2, 5), mask).item() == pytest.approx((5 * 1 + 16) / 6)
    with noise.replay([torch.tensor([3, 5]), torch.zeros(2, 5)]):  # per sample: weights that sum to one in each
        mean = loss_fn(lambda x, labels: errors, torch.zeros(2, 5), mask / mask.sum(1, keepdim=True))
    assert mean.item() == pytest.approx((1 + 16) / 2)


def untouched(*_: Any) -> Tensor:
    raise AssertionError("the network was called")


WRONG_MASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": ([[True]], TypeError, "mask: expected a tensor of bools or of weights >= 0, got list"),
    "complex": (torch.ones(2, 3, 4, dtype=torch.complex64), TypeError, "mask: .* got torch.complex64"),
    "one a step": (torch.ones(2, 3), ValueError, r"mask: .* got \(2, 3\)\. Write mask\.reshape\(2, 3, 1\)\."),
    "one a sample": (torch.ones(2), ValueError, r"mask: .* got \(2,\)\. Write mask\.reshape\(2, 1, 1\)\."),
    "no batch": (
        torch.ones(3, 4),
        ValueError,
        r"mask: expected the dimensions of the batch, \(2, 3, 4\), .* got \(3, 4\)\.$",
    ),
    "another size": (torch.ones(2, 3, 2), ValueError, r"mask: .* each its size or 1, got \(2, 3, 2\)\.$"),
    "more dimensions": (torch.ones(2, 3, 4, 1), ValueError, r"mask: .* got \(2, 3, 4, 1\)\.$"),
    "device": (torch.ones(2, 3, 4, device="meta"), ValueError, "mask: expected the device of the batch, cpu, got meta"),
    "negative": (torch.full((2, 3, 4), -1.0), ValueError, "mask: expected bools or finite weights >= 0"),
    "nan": (torch.full((2, 1, 1), torch.nan), ValueError, "mask: expected bools or finite weights >= 0"),
    "inf": (torch.full((2, 1, 1), torch.inf), ValueError, "mask: expected bools or finite weights >= 0"),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_wrong_masks_are_refused(wrong: str) -> None:
    mask, error, message = WRONG_MASKS[wrong]
    for name in LOSSES:
        with pytest.raises(error, match=message):
            LOSSES[name][0](untouched, torch.zeros(2, 3, 4), mask)


def test_missing_values_that_are_observed_are_named() -> None:
    batch, mask = torch.zeros(B, D), torch.ones(B, D)
    batch[3, 1], batch[5, 2], mask[5, 2] = torch.nan, torch.nan, 0
    for name in LOSSES:
        with pytest.raises(ValueError, match="batch: expected finite values, got NaN or Inf in sample 3"):
            LOSSES[name][0](untouched, batch, mask)


@pytest.mark.parametrize("train", [False, True])
def test_steps_take_masks(train: bool) -> None:
    state, batch = training_state(Net()), torch.randn(B, D)
    batch[:, 2] = torch.nan
    step_fn = losses.get_step_fn(VP, train, losses.optimization_manager(config()), reduce_mean=True)
    loss_fn = losses.get_sde_loss_fn(VP, train, likelihood_weighting=False)
    with noise.seeds(1, range(B)):
        right = loss_fn(copy.deepcopy(state["model"]), batch, mask=~batch.isnan())
    with noise.seeds(1, range(B)):
        loss = step_fn(state, batch, mask=~batch.isnan())
    assert torch.equal(loss, right)
    assert state["step"] == train
    with pytest.raises(ValueError, match="batch: expected finite values"):
        step_fn(state, batch)


def test_compiled_masked_loss() -> None:
    loss_fn, net, batch, mask = losses.get_sde_loss_fn(VP, True), nn.Linear(D, D), torch.randn(B, D), MASKS["bools"]

    def run(batch: Tensor, mask: Tensor) -> Tensor:
        return loss_fn(lambda x, labels: net(x), batch, mask)

    results = []
    for f in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        loss = f(batch, mask)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))])
    assert_same(results[1], results[0])


# --- loss scales ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_scaled_half_precision_training(data: torch.dtype, masked: bool) -> None:
    """Weights of 1 / (B D) = 1e-5 underflow in float16 gradients without a scale. With one the update is float32's."""
    x0 = torch.randn(64, 1536)
    mask = (torch.ones(64, 1),) if masked else ()
    net = nn.Linear(1536, 1536, bias=False)
    loss_fn = losses.get_sde_loss_fn(VP, True, likelihood_weighting=False)

    def loss(dtype: torch.dtype) -> Tensor:
        with noise.seeds(0, range(64)):
            return loss_fn(lambda x, labels: net(x).to(dtype), x0, *mask)

    loss(torch.float32).backward()
    right, net.weight.grad = net.weight.grad, None
    x0 = x0.to(data)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer, before = torch.optim.SGD(net.parameters(), lr=1.0), net.weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        found = loss(torch.float16)
    scaler.scale(found).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536
    update = before - net.weight.detach()
    assert (update - right).norm() < 5e-3 * right.norm()


# --- pickling ---------------------------------------------------------------------------------------------------------


def copies(f: Any) -> list[Any]:
    return [pickle.loads(pickle.dumps(f)), copy.deepcopy(f)]


@every_loss
def test_losses_pickle(name: str) -> None:
    net, x0 = Net(), torch.randn(B, D)
    loss_fn = LOSSES[name][0]
    with noise.seeds(1, range(B)):
        right = loss_fn(net, x0)
    for copied in copies(loss_fn):
        with noise.seeds(1, range(B)):
            assert torch.equal(copied(net, x0), right)


STEPS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "sde": lambda train, f: losses.get_step_fn(VP, train, f),
    "user's": lambda train, f: losses.get_step_fn(Decay(1000), train, f, likelihood_weighting=True),
    "smld": lambda train, f: losses.get_step_fn(VE, train, f, continuous=False),
    "ddpm": lambda train, f: losses.get_step_fn(sde_lib.VPSDE(N=50), train, f, continuous=False, on_nonfinite="skip"),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_steps_pickle(kind: str, train: bool) -> None:
    step_fn = STEPS[kind](train, losses.optimization_manager(config()))
    batch, results = torch.randn(B, D), []
    for f in [step_fn, *copies(step_fn)]:
        torch.manual_seed(0)
        state = training_state(Net())
        for _ in range(2):
            f(state, batch)
        results.append([f(state, batch).detach(), contents(state)])
    for result in results[1:]:
        assert_same(result, results[0])

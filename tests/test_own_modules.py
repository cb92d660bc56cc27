"""What a program brings itself: SDEs, score functions, networks, predictors, and attributes that it changes later."""

import copy
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixtures import program
from torch import Tensor, nn

from scoresde_ext import (
    controllable_generation,
    encoding,
    likelihood,
    losses,
    noise,
    sampling,
    sde_lib,
    stochastic,
)
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.foreign import recognised
from scoresde_ext.models import ema
from scoresde_ext.models import utils as mutils
from scoresde_ext.models.program import score_function

SHAPE = (4, 3, 2, 2)
TIMES = torch.tensor([0.01, 0.3, 0.7, 0.99])


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(x: Any) -> Any:
    return x


def network(x: Tensor, labels: Tensor) -> Tensor:
    return torch.tanh(x) * (1.0 + 0.5 * torch.sin(labels.float() / 50))[(..., *[None] * (x.dim() - 1))]


class Module(nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return network(x, labels)


@pytest.fixture
def theirs() -> Iterator[SimpleNamespace]:
    """The program's own modules, not in sys.modules."""
    with program(()) as modules:
        pass
    yield modules


USES: dict[str, Callable[[Any, Any], Any]] = {
    "loss": lambda sde, model: losses.get_sde_loss_fn(sde, False)(model, normals(*SHAPE)),
    "step": lambda sde, model: losses.get_step_fn(sde, False, continuous=False)(
        {"model": nn.Identity(), "ema": ema.ExponentialMovingAverage([], 0.9)}, normals(*SHAPE)
    ),
    "smld": lambda sde, model: losses.get_smld_loss_fn(sde, False)(model, normals(*SHAPE)),
    "ddpm": lambda sde, model: losses.get_ddpm_loss_fn(sde, False)(model, normals(*SHAPE)),
    "pc": lambda sde, model: sampling.get_pc_sampler(
        sde, SHAPE, sampling.EulerMaruyamaPredictor, sampling.AnnealedLangevinDynamics, same, 0.1, continuous=True,
        device="cpu",
    )(model)[0],
    "ode": lambda sde, model: sampling.get_ode_sampler(sde, SHAPE, same, rtol=1e-2, atol=1e-2, device="cpu")(model)[0],
    "sde": lambda sde, model: stochastic.get_sde_sampler(sde, SHAPE, same, steps=4, device="cpu")(model)[0],
    "likelihood": lambda sde, model: likelihood.get_likelihood_fn(sde, same, rtol=1e-2, atol=1e-2)(
        model, normals(*SHAPE)
    )[0],
    "inpainting": lambda sde, model: controllable_generation.get_pc_inpainter(
        sde, sampling.ReverseDiffusionPredictor, None, same, 0.1, continuous=True
    )(model, normals(*SHAPE), torch.ones(SHAPE)),
    "encoding": lambda sde, model: encoding.encode(sde, model, normals(*SHAPE), rtol=1e-2, atol=1e-2),
    "decoding": lambda sde, model: encoding.decode(sde, model, normals(*SHAPE), rtol=1e-2, atol=1e-2),
    "grid": lambda sde, model: sampling.calibrate_grid(sde, model, SHAPE, nfe=3, samples=2, device="cpu").log_snr,
    "score": lambda sde, model: mutils.get_score_fn(sde, model, continuous=True)(normals(*SHAPE), TIMES),
    "predictor": lambda sde, model: sampling.shared_predictor_update_fn(
        normals(*SHAPE), TIMES, sde, model, sampling.EulerMaruyamaPredictor, False, True
    )[0],
    "corrector": lambda sde, model: sampling.shared_corrector_update_fn(
        normals(*SHAPE), TIMES, sde, model, sampling.LangevinCorrector, True, 0.1, 1
    )[0],
}  # fmt: skip
every_use = pytest.mark.parametrize("use", USES)


# --- SDEs -------------------------------------------------------------------------------------------------------------


@every_use
def test_an_unknown_sde_is_refused(use: str, theirs: SimpleNamespace) -> None:
    """Upstream raises NotImplementedError for it, too: nobody knows what its networks return."""
    for sde in (theirs.sde_lib.ConstantSDE(8), SimpleNamespace(N=8, T=1), None):
        with pytest.raises(NotImplementedError, match=f"^sde: expected VPSDE, .* got {type(sde).__name__}"):
            USES[use](sde, Module())


def test_a_class_of_a_known_name_without_its_attributes_is_refused() -> None:
    class VPSDE:
        N, T = 8, 1

    with pytest.raises(NotImplementedError, match="^sde: .* got VPSDE without beta_0, beta_1, sde, "):
        losses.get_sde_loss_fn(VPSDE(), False)


def test_ours_are_what_they_are() -> None:
    class LikeVP(sde_lib.VPSDE):
        pass

    for sde in (sde_lib.VPSDE(), LikeVP(), sde_lib.subVPSDE(), sde_lib.VESDE()):
        assert recognised(sde) is sde


KINDS = {"vp": ("VPSDE", (0.1, 5.0, 8)), "subvp": ("subVPSDE", (0.1, 5.0, 8)), "ve": ("VESDE", (0.01, 5.0, 8))}


@pytest.mark.parametrize("kind", KINDS)
def test_the_programs_sde_runs_in_our_kernels(kind: str, theirs: SimpleNamespace) -> None:
    """Also for data that its own formulas could not do."""
    name, parameters = KINDS[kind]
    given, ours = getattr(theirs.sde_lib, name)(*parameters), getattr(sde_lib, name)(*parameters)
    read = recognised(given)
    assert sde_lib.is_affine(read) and isinstance(read, getattr(sde_lib, name)) and recognised(given) is read
    random = torch.get_rng_state()
    for use in ("loss", "pc", "ode", "sde", "likelihood", "inpainting", "encoding", "score", "predictor"):
        results = []
        for sde in (given, ours):
            torch.manual_seed(0)
            results.append(USES[use](sde, network))
        assert torch.equal(*results), use
    torch.set_rng_state(random)
    again = getattr(theirs.sde_lib, name)(*parameters)
    recognised(again)
    assert torch.equal(torch.get_rng_state(), random)  # looking at it takes no random numbers
    x = normals(4, 5)
    for a, b in zip(read.discretize(x, TIMES), ours.discretize(x, TIMES), strict=True):
        assert torch.equal(a, b)


def test_the_name_counts_wherever_the_class_is_from(theirs: SimpleNamespace) -> None:
    """Also where upstream's class was put on our SDE; under another name, that is a user's own SDE."""
    bases = (theirs.sde_lib.VPSDE.__mro__[1], sde_lib.SDE)
    methods = {name: value for name, value in vars(theirs.sde_lib.VPSDE).items() if not name.startswith("__")}
    labels: list[Tensor] = []

    def record(x: Tensor, given: Tensor) -> Tensor:
        labels.append(given)
        return x

    for name in ("VPSDE", "Mine"):
        cls = type(name, bases, methods)
        mutils.get_score_fn(cls(0.1, 5.0, 8), record, continuous=True)(normals(*SHAPE), TIMES)
    torch.testing.assert_close(labels, [999 * TIMES, TIMES])


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_keep_the_programs_sde(kind: str, theirs: SimpleNamespace) -> None:
    """A predictor of the program's own asks isinstance(self.sde, its VPSDE)."""
    name, parameters = KINDS[kind]
    sde = getattr(theirs.sde_lib, name)(*parameters)
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    assert sampling.ReverseDiffusionPredictor(sde, score_fn).sde is sde
    assert sampling.LangevinCorrector(sde, score_fn, 0.1, 1).sde is sde


def changed(theirs: SimpleNamespace, method: str) -> Any:
    """Their VPSDE, with one method that computes something else."""
    VPSDE = theirs.sde_lib.VPSDE

    def twice(self: Any, *args: Any) -> Any:
        found = getattr(VPSDE, method)(self, *args)
        return (found[0], 2 * found[1]) if isinstance(found, tuple) else 2 * found

    def reverse(self: Any, score_fn: Any, probability_flow: bool = False) -> Any:
        return VPSDE.reverse(self, lambda x, t: 2 * score_fn(x, t), probability_flow)

    return type("Mine", (VPSDE,), {method: reverse if method == "reverse" else twice})(0.1, 5.0, 8)


@pytest.mark.parametrize("method", ["sde", "marginal_prob", "discretize", "reverse", "prior_sampling", "prior_logp"])
def test_one_changed_method_is_enough_to_be_called(method: str, theirs: SimpleNamespace) -> None:
    sde = changed(theirs, method)
    read = recognised(sde)
    assert isinstance(read, sde_lib.VPSDE) and not sde_lib.is_affine(read)
    x = normals(*SHAPE)
    if method == "reverse":
        score = mutils.get_score_fn(sde, network, continuous=True)
        right = sde.reverse(score).sde(x, TIMES)[0]
        torch.testing.assert_close(sampling.EulerMaruyamaPredictor(sde, score).rsde.sde(x, TIMES)[0], right)
    elif method == "prior_sampling":
        torch.manual_seed(0)
        right = sde.prior_sampling(SHAPE)
        torch.manual_seed(0)
        assert torch.equal(noise.prior(sde, SHAPE, "cpu"), right)
    elif method == "prior_logp":
        plain = theirs.sde_lib.VPSDE(0.1, 5.0, 8)
        bpd, twice = (
            likelihood.get_likelihood_fn(s, same, hutchinson_type="exact", rtol=1e-3, atol=1e-3)(network, x)
            for s in (plain, sde)
        )
        extra = plain.prior_logp(bpd[1]) / 12 / torch.log(torch.tensor(2.0))
        torch.testing.assert_close(twice[0], bpd[0] - extra, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(getattr(read, method)(x, TIMES), getattr(sde, method)(x, TIMES))


def test_changed_formulas_are_for_images_alone(theirs: SimpleNamespace) -> None:
    """(B, 1, 1, 1) times (B, D) is (B, 1, B, D), in silence."""
    sde, message = changed(theirs, "sde"), r"^sde: expected Mine.{} to return an array like x, \(4, 5\)"
    with pytest.raises(ValueError, match=message.format("marginal_prob")):
        losses.get_sde_loss_fn(sde, False)(network, normals(4, 5))
    with pytest.raises(ValueError, match=message.format(r"reverse\(\).sde")):
        sampling.get_pc_sampler(
            sde, (4, 5), sampling.EulerMaruyamaPredictor, None, same, 0.1, continuous=True, device="cpu"
        )(network)


# --- attributes that change later -------------------------------------------------------------------------------------


def test_the_programs_sde_is_followed_when_it_changes(theirs: SimpleNamespace) -> None:
    sde = theirs.sde_lib.VPSDE(0.1, 5.0, 8)
    loss_fn = losses.get_sde_loss_fn(sde, False)
    sampler = sampling.get_ode_sampler(sde, SHAPE, same, device="cpu")
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    sde.beta_1 = 10.0
    new = sde_lib.VPSDE(0.1, 10.0, 8)
    for mine, right in (
        (loss_fn, losses.get_sde_loss_fn(new, False)),
        (lambda model, x: sampler(model, x)[0], lambda model, x: sampling.get_ode_sampler(
            new, SHAPE, same, device="cpu")(model, x)[0]),
        (lambda model, x: score_fn(x, TIMES), lambda model, x: mutils.get_score_fn(
            new, model, continuous=True)(x, TIMES)),
    ):  # fmt: skip
        torch.manual_seed(0)
        found = mine(network, normals(*SHAPE))
        torch.manual_seed(0)
        torch.testing.assert_close(found, right(network, normals(*SHAPE)), rtol=1e-4, atol=1e-4)
    sde.sde = lambda x, t: (x, t)
    assert not sde_lib.is_affine(recognised(sde))
    other = theirs.sde_lib.subVPSDE(0.1, 5.0, 8)
    assert sde_lib.is_affine(recognised(other))
    theirs.sde_lib.subVPSDE.sde = theirs.sde_lib.VPSDE.sde
    assert not sde_lib.is_affine(recognised(other))


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_tables_that_the_program_did_not_make_again_are_refused(kind: str, theirs: SimpleNamespace) -> None:
    name, parameters = KINDS[kind]
    sde = getattr(theirs.sde_lib, name)(*parameters)
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    predictors = [
        cls(sde, score_fn) for cls in (sampling.ReverseDiffusionPredictor, sampling.AncestralSamplingPredictor)
    ]
    sde.N = 6
    predictors += [type(p)(sde, score_fn) for p in predictors]
    for predictor in predictors:
        with pytest.raises(ValueError, match="^sde: expected (discrete_.*|alphas) of N = 6 values, got 8"):
            predictor.update_fn(normals(*SHAPE), TIMES)
    assert sampling.EulerMaruyamaPredictor(sde, score_fn).update_fn(normals(*SHAPE), TIMES)[0].isfinite().all()


SETTINGS = {
    "vp": ({"N": 30}, {"beta_0": 0.2}, {"beta_1": 8.0}),
    "subvp": ({"N": 30}, {"beta_0": 0.2}, {"beta_1": 8.0}),
    "ve": ({"N": 30}, {"sigma_min": 0.02}, {"sigma_max": 8.0}),
}
CONSTRUCTOR = {"beta_0": "beta_min", "beta_1": "beta_max"}


@pytest.mark.parametrize(("kind", "change"), [(k, c) for k, changes in SETTINGS.items() for c in changes], ids=str)
def test_an_attribute_that_is_set_later_takes_effect_everywhere(kind: str, change: dict[str, Any]) -> None:
    """Whatever was made before it is set: samplers, losses, score functions, predictors, correctors."""
    name, parameters = KINDS[kind]
    ((attribute, value),) = change.items()
    names = ("sigma_min", "sigma_max", "N") if kind == "ve" else ("beta_min", "beta_max", "N")
    right = getattr(sde_lib, name)(
        **(dict(zip(names, parameters, strict=True)) | {CONSTRUCTOR.get(attribute, attribute): value})
    )
    late = getattr(sde_lib, name)(*parameters)
    made = [uses_of(sde, kind) for sde in (late, right)]
    for use in made[0]:  # whatever is kept is kept by now
        torch.manual_seed(0)
        made[0][use]()
    setattr(late, attribute, value)
    for table in late.TABLES:
        assert torch.equal(getattr(late, table), getattr(right, table))
    for use in made[0]:
        found = []
        for calls in made:
            torch.manual_seed(0)
            found.append(calls[use]())
        assert torch.equal(*found), use


def uses_of(sde: Any, kind: str) -> dict[str, Callable[[], Tensor]]:
    x = normals(*SHAPE)
    pc = sampling.get_pc_sampler(
        sde, SHAPE, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, same, 0.1, device="cpu"
    )
    ode = sampling.get_ode_sampler(sde, SHAPE, same, denoise=True, rtol=1e-2, atol=1e-2, device="cpu")
    sde_sampler = stochastic.get_sde_sampler(sde, SHAPE, same, steps=4, device="cpu")
    discrete = mutils.get_score_fn(sde, network)
    steps = [
        sampling.EulerMaruyamaPredictor(sde, discrete),
        sampling.ReverseDiffusionPredictor(sde, discrete),
        sampling.LangevinCorrector(sde, discrete, 0.1, 1),
        sampling.AnnealedLangevinDynamics(sde, discrete, 0.1, 1),
    ]
    if kind != "subvp":
        steps.append(sampling.AncestralSamplingPredictor(sde, discrete))
        loss_fn = losses.get_ddpm_loss_fn(sde, True) if kind == "vp" else losses.get_smld_loss_fn(sde, True)
    else:
        loss_fn = losses.get_sde_loss_fn(sde, True)
    uses: dict[str, Callable[[], Tensor]] = {
        "loss": lambda: losses.get_sde_loss_fn(sde, True)(network, x),
        "discrete loss": lambda: loss_fn(network, x),
        "pc": lambda: pc(network)[0],
        "ode": lambda: ode(network)[0],
        "sde": lambda: sde_sampler(network)[0],
        "score": lambda: discrete(x, TIMES),
        "prior": lambda: sde.prior_logp(x),
    }
    return uses | {type(step).__name__: lambda step=step: step.update_fn(x, TIMES)[0] for step in steps}  # type: ignore[misc]


def test_a_number_of_steps_that_is_none_is_refused_later_too() -> None:
    for sde in (sde_lib.VPSDE(), sde_lib.VESDE()):
        for wrong in (0, -3, 2.5):
            with pytest.raises(ValueError, match="^N: expected a whole number of steps from 1 on"):
                sde.N = wrong
        assert sde.N == 1000
    with pytest.raises(ValueError, match="^beta_min, beta_max: expected 0 < beta_min <= beta_max"):
        sde_lib.VPSDE().beta_1 = 0.05
    with pytest.raises(ValueError, match="^sigma_min, sigma_max: expected 0 < sigma_min"):
        sde_lib.VESDE().sigma_min = 0.0


def test_tables_that_are_set_do_not_contradict_each_other() -> None:
    sde = sde_lib.VPSDE(N=40)
    cosine = torch.linspace(0.001, 0.1, 40).square()
    sde.discrete_betas = cosine
    torch.testing.assert_close(sde.alphas_cumprod, torch.cumprod(1 - cosine, 0))
    torch.testing.assert_close(sde.discretize(torch.ones(1, 1), torch.ones(1))[1], cosine[-1:].sqrt())
    sde.alphas = 1 - cosine  # as upstream's own code does it
    with pytest.raises(ValueError, match="^alphas_cumprod: follows from discrete_betas"):
        sde.alphas_cumprod = torch.ones(40)
    with pytest.raises(ValueError, match="^N: discrete_betas was set by hand"):
        sde.N = 20
    with pytest.raises(ValueError, match=r"^discrete_betas: expected a tensor torch.float32 \(40,\), got"):
        sde.discrete_betas = torch.ones(20)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_tables_that_are_written_to_are_refused(kind: str) -> None:
    name, parameters = KINDS[kind]
    sde = getattr(sde_lib, name)(*parameters)
    for copied in (sde, copy.deepcopy(sde)):
        copied.discretize(normals(*SHAPE), TIMES)
        getattr(copied, copied.TABLES[0]).mul_(0.5)
        with pytest.raises(ValueError, match=f"^{copied.TABLES[0]}: was written to"):
            copied.discretize(normals(*SHAPE), TIMES)


# --- too few steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [sde_lib.VPSDE, sde_lib.subVPSDE])
def test_too_few_steps_are_named_where_the_discrete_process_is_used(cls: type) -> None:
    sde = cls(N=10)  # beta_max = 20
    message = "^N: the discrete process of .* expects N > beta_max, .* got N = 10 and beta_max = 20"
    uses: list[Callable[[], Any]] = [
        lambda: sampling.get_pc_sampler(
            sde, SHAPE, sampling.EulerMaruyamaPredictor, sampling.LangevinCorrector, same, 0.1, device="cpu"
        )(network)
    ]
    if cls is sde_lib.VPSDE:
        score_fn = mutils.get_score_fn(sde, network, continuous=True)
        uses += [
            lambda: sampling.ReverseDiffusionPredictor(sde, score_fn).update_fn(normals(*SHAPE), TIMES),
            lambda: sampling.ReverseDiffusionPredictor(sde, score_fn).update_fn(normals(*SHAPE), torch.ones(4)),
            lambda: mutils.get_score_fn(sde, network)(normals(*SHAPE), TIMES),
            lambda: losses.get_ddpm_loss_fn(sde, True),
            lambda: losses.get_step_fn(sde, False, continuous=False),
        ]
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()


def test_as_many_steps_as_beta_max_have_no_ancestral_sampling() -> None:
    """1 / sqrt(1 - beta) with beta = 1."""
    sde = sde_lib.VPSDE(N=20)
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    for t in (torch.ones(4), torch.linspace(0.2, 1.0, 4)):
        with pytest.raises(ValueError, match="got N = 20 and beta_max = 20"):
            sampling.AncestralSamplingPredictor(sde, score_fn).update_fn(normals(*SHAPE), t)
        assert sampling.ReverseDiffusionPredictor(sde, score_fn).update_fn(normals(*SHAPE), t)[0].isfinite().all()


def test_few_steps_do_where_nothing_is_discrete() -> None:
    sde = sde_lib.VPSDE(N=10)
    z = normals(*SHAPE)
    # The step without noise at eps is the first of the discrete process, which exists.
    for denoise in (False, True):
        samples = [
            sampling.get_ode_sampler(s, SHAPE, same, denoise=denoise, device="cpu")(network, z)[0]
            for s in (sde, sde_lib.VPSDE())
        ]
        if not denoise:
            assert torch.equal(*samples)
        assert samples[0].isfinite().all()
    pc = sampling.get_pc_sampler(
        sde, SHAPE, sampling.EulerMaruyamaPredictor, None, same, 0.1, continuous=True, device="cpu"
    )
    assert pc(network)[0].isfinite().all()
    assert losses.get_sde_loss_fn(sde, False)(network, z).isfinite()


# --- score functions --------------------------------------------------------------------------------------------------

SDE_USES = [use for use in USES if use not in ("step", "smld", "ddpm", "score", "grid")]


def half_score(calls: list[Any]) -> Callable[..., Any]:
    """What a program may put in the place of get_score_fn."""

    def get_score_fn(sde: Any, model: Any, train: bool = False, continuous: bool = False) -> Any:
        calls.append(sde)
        return lambda x, t: -0.5 * model(x, 999 * t) / sde.marginal_prob(x, t)[1][:, None, None, None]

    return get_score_fn


def half_network(x: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * network(x, labels)


@pytest.mark.parametrize("use", SDE_USES)
def test_a_score_function_in_the_place_of_ours_is_called(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sde, calls = sde_lib.VPSDE(0.1, 5.0, 8), []
    torch.manual_seed(0)
    right = USES[use](sde, half_network)
    monkeypatch.setattr(mutils, "get_score_fn", half_score(calls))
    torch.manual_seed(0)
    found = USES[use](sde, network)
    assert calls
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "use"),
    [(sampling, "pc"), (sampling, "ode"), (sampling, "predictor"), (sampling, "inpainting"), (losses, "loss"),
     (likelihood, "likelihood")],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)  # fmt: skip
def test_a_models_utils_in_the_place_of_ours_is_used(module: Any, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(module, "mutils", SimpleNamespace(get_score_fn=half_score(calls)))
    USES[use](sde_lib.VPSDE(0.1, 5.0, 8), network)
    assert calls


def test_sampling_get_score_fn_in_the_place_of_ours_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(sampling, "get_score_fn", half_score(calls))
    USES["ode"](sde_lib.VPSDE(0.1, 5.0, 8), network)
    assert calls


@pytest.fixture
def beside_us(monkeypatch: pytest.MonkeyPatch, theirs: SimpleNamespace) -> SimpleNamespace:
    """A program that imports ours by our names, and whose networks import its own models.utils."""
    monkeypatch.setitem(sys.modules, "models.utils", theirs.utils)
    return theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("continuous", [True, False])
def test_a_copy_of_upstreams_leaves_the_kernels_in_use(kind: str, continuous: bool, beside_us: SimpleNamespace) -> None:
    """Although it knows only the SDEs of its own sde_lib."""
    name, parameters = KINDS[kind]
    sde = getattr(sde_lib, name)(*parameters)
    theirs, ours = (
        score_function(s, Module(), False, continuous) for s in (sde, getattr(beside_us.sde_lib, name)(*parameters))
    )
    for score_fn in (theirs, ours):
        assert isinstance(score_fn.network.model, Module)
        assert score_fn.predicts_noise == (kind == "subvp" or (kind == "vp" and continuous))


@pytest.mark.parametrize("change", ["LARGEST_LABEL", "OUTPUT_SCALE"])
def test_a_changed_copy_is_called(change: str, beside_us: SimpleNamespace) -> None:
    setattr(beside_us.utils, change, 0.5)
    sde, x = sde_lib.VPSDE(0.1, 5.0, 8), normals(*SHAPE)
    score_fn = score_function(sde, Module(), False, True)
    factors = {"LARGEST_LABEL": 999.0, "OUTPUT_SCALE": 1.0} | {change: 0.5}
    out = factors["OUTPUT_SCALE"] * network(x, factors["LARGEST_LABEL"] * TIMES)
    right = -out / sde.marginal_prob(x, TIMES)[1][:, None, None, None]
    torch.testing.assert_close(score_fn(x, TIMES), right)
    assert not score_fn.predicts_noise


def test_looking_at_a_score_function_takes_no_random_numbers(beside_us: SimpleNamespace) -> None:
    random = torch.get_rng_state()
    with noise.replay([]), noise.torch_draws():
        score_function(sde_lib.VPSDE(0.1, 5.0, 8), Module(), False, True)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_changed_model_fn_is_called_by_discrete_losses(beside_us: SimpleNamespace) -> None:
    sde, x = sde_lib.VPSDE(0.1, 5.0, 8), normals(*SHAPE)
    torch.manual_seed(0)
    right = losses.get_ddpm_loss_fn(sde, False)(half_network, x)
    beside_us.utils.OUTPUT_SCALE = 0.5
    beside_us.utils.get_model_fn = copy_of(beside_us.utils.get_model_fn)
    torch.manual_seed(0)
    torch.testing.assert_close(losses.get_ddpm_loss_fn(sde, False)(Module(), x), right)


@pytest.mark.parametrize("use", ["loss", "ddpm", "pc", "ode", "likelihood"])
def test_a_model_fn_in_the_place_of_ours_is_called(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sde = sde_lib.VPSDE(0.1, 5.0, 8)
    torch.manual_seed(0)
    right = USES[use](sde, half_network)
    monkeypatch.setattr(mutils, "get_model_fn", lambda model, train=False: lambda x, labels: 0.5 * model(x, labels))
    torch.manual_seed(0)
    torch.testing.assert_close(USES[use](sde, network), right)


def copy_of(function: Any) -> Any:
    """Another object: what is found out about a function is found out once."""
    return type(function)(function.__code__, function.__globals__, function.__name__, function.__defaults__)


def test_an_sde_derived_from_ours_keeps_the_documented_convention(beside_us: SimpleNamespace) -> None:
    """Although the program's own get_score_fn does not know it."""

    class Constant(sde_lib.AffineSDE):
        def marginal_coefficients(self, t: Any) -> Any:
            return torch.exp(-t), torch.sqrt(-torch.expm1(-2 * t))

        def sde_coefficients(self, t: Any) -> Any:
            return -torch.ones_like(t), torch.full_like(t, 2**0.5)

    x = normals(*SHAPE)
    score_fn = score_function(Constant(8), Module(), False, True)
    torch.testing.assert_close(score_fn(x, TIMES), network(x, TIMES))


@pytest.mark.parametrize("whose", ["our SDE", "their SDE"])
@pytest.mark.parametrize("fullgraph", [False, pytest.param(True, marks=pytest.mark.torch("2.12"))])
def test_losses_compile_beside_the_programs_own_modules(
    fullgraph: bool, whose: str, beside_us: SimpleNamespace
) -> None:
    """What is looked at in its modules is looked at outside of the graph."""
    sde = (sde_lib if whose == "our SDE" else beside_us.sde_lib).VPSDE(0.1, 5.0, 8)
    loss_fn, x = losses.get_sde_loss_fn(sde, False), normals(*SHAPE)
    compiled = torch.compile(lambda x: loss_fn(Module(), x), backend="eager", fullgraph=fullgraph)
    results = []
    for function in (compiled, lambda x: loss_fn(Module(), x)):
        with noise.seeds(0, range(4)):
            results.append(function(x))
    torch.testing.assert_close(*results)


# --- predictors and correctors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), [("vp", "vpsde_update_fn"), ("ve", "vesde_update_fn")])
def test_ancestral_sampling_calls_the_update_that_a_subclass_has(kind: str, method: str) -> None:
    name, parameters = KINDS[kind]
    sde = getattr(sde_lib, name)(*parameters)

    def update(self: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_mean = x + self.score_fn(x, t)
        return x_mean + torch.randn_like(x), x_mean

    mine = type("Mine", (sampling.AncestralSamplingPredictor,), {method: update})
    other = type("Other", (sampling.AncestralSamplingPredictor,), {"vesde_update_fn": None, "vpsde_update_fn": None})
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    x = normals(*SHAPE)
    assert torch.equal(mine(sde, score_fn).update_fn(x, TIMES)[1], x + score_fn(x, TIMES))
    ours = sampling.AncestralSamplingPredictor(sde, score_fn)
    with noise.seeds(0, range(4)):
        direct = getattr(ours, method)(x, TIMES)
    with noise.seeds(0, range(4)):
        assert all(map(torch.equal, direct, ours.update_fn(x, TIMES)))
    # step_to would do the steps of the class it is from
    for cls in (mine, other):
        with pytest.raises(ValueError, match="^grid: expected a predictor with a method step_to"):
            sampling.get_pc_sampler(
                sde, SHAPE, cls, None, same, 0.1, continuous=True, grid=[1.0, 0.5, 1e-3], device="cpu"
            )


def test_a_reverse_of_another_sde_is_followed_by_the_ode_sampler() -> None:
    class Mine(sde_lib.VPSDE):
        def reverse(self, score_fn: Any, probability_flow: bool = False) -> Any:
            return sde_lib.VPSDE(0.1, 10.0, 8).reverse(score_fn, probability_flow)

    z, score = normals(*SHAPE), lambda x, t: -x
    drift = sde_lib.VPSDE(0.1, 10.0, 8).reverse(score, True).sde(z, TIMES)[0]
    (found,) = ProbabilityFlow(Mine(0.1, 5.0, 8), score).terms(TIMES.double(), (z,))
    torch.testing.assert_close(found.f * z + found.q * found.out if not found.plain else found.out, drift)


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = {
    "sde_lib": "SDE VPSDE subVPSDE VESDE",
    "losses": (
        "get_optimizer optimization_manager get_sde_loss_fn get_smld_loss_fn get_ddpm_loss_fn get_step_fn "
        "mutils VESDE VPSDE"
    ),
    "sampling": (
        "register_predictor register_corrector get_predictor get_corrector get_sampling_fn Predictor Corrector "
        "EulerMaruyamaPredictor ReverseDiffusionPredictor AncestralSamplingPredictor NonePredictor LangevinCorrector "
        "AnnealedLangevinDynamics NoneCorrector shared_predictor_update_fn shared_corrector_update_fn get_pc_sampler "
        "get_ode_sampler from_flattened_numpy to_flattened_numpy get_score_fn sde_lib mutils"
    ),
    "likelihood": "get_div_fn get_likelihood_fn mutils",
    "controllable_generation": (
        "get_pc_inpainter get_pc_colorizer mutils NoneCorrector NonePredictor shared_corrector_update_fn "
        "shared_predictor_update_fn"
    ),
    "models.utils": (
        "register_model get_model get_sigmas get_ddpm_params create_model get_model_fn get_score_fn "
        "to_flattened_numpy from_flattened_numpy sde_lib"
    ),
    "models.ema": "ExponentialMovingAverage",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_that_upstreams_module_exposes(module: str) -> None:
    for name in NAMES[module].split():
        scope: dict[str, Any] = {}
        exec(f"from scoresde_ext.{module} import {name}", scope)
    assert sampling.get_score_fn is mutils.get_score_fn and sampling.mutils is mutils


# --- registries -------------------------------------------------------------------------------------------------------


def test_networks_of_the_programs_own_registry_are_found(beside_us: SimpleNamespace) -> None:
    """Upstream's networks register themselves in upstream's models.utils."""

    @beside_us.utils.register_model
    class TheirNetwork(Module):
        def __init__(self, config: Any) -> None:
            super().__init__()

    assert mutils.get_model("TheirNetwork") is TheirNetwork
    config = SimpleNamespace(model=SimpleNamespace(name="TheirNetwork"), device="cpu")
    assert isinstance(mutils.create_model(config).module, TheirNetwork)
    with pytest.raises(KeyError, match=r"model: expected a registered one \(.*TheirNetwork.*\), got 'ncsnpp'"):
        mutils.get_model("ncsnpp")


def test_unknown_predictors_and_correctors_are_told_what_there_is() -> None:
    with pytest.raises(
        KeyError, match=r"predictor: expected .* one \(.*ancestral_sampling.*euler_maruyama.*\), got 'euler'"
    ):
        sampling.get_predictor("euler")
    with pytest.raises(KeyError, match=r"corrector: expected .* one \(.*ald.* langevin.*\), got 'Langevin'"):
        sampling.get_corrector("Langevin")

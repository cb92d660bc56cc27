"""Inpainting and colorization against samples recorded from upstream."""

from golden import arrays, assert_rounding, cases, every_case, expected, make_network, make_sde, recorded, to_unit_range

from scoresde_ext import controllable_generation, noise, sampling

# As in test_golden_pc.py; a colorization also turns every state into gray and colour and back, twice a step.
ROUNDINGS = 32

SECTION = arrays("controllable")


@every_case("controllable")
def test_sample(name: str) -> None:
    case = cases("controllable")[name]
    make = {
        "inpaint": controllable_generation.get_pc_inpainter,
        "colorize": controllable_generation.get_pc_colorizer,
    }[case["task"]]
    sampler = make(
        make_sde(case), sampling.get_predictor(case["predictor"]), sampling.get_corrector(case["corrector"]),
        to_unit_range, case["snr"], n_steps=case["n_steps"], probability_flow=False, continuous=True,
        denoise=case["denoise"], eps=case["eps"],
    )  # fmt: skip
    given = (SECTION["data"], SECTION["mask"]) if case["task"] == "inpaint" else (SECTION["gray"],)
    # the prior; then in every step the corrector's draw (langevin only), one for the known part, the predictor's draw,
    # one more for the known part
    with noise.replay(recorded("controllable", case["noise_from"], "noise")):
        x = sampler(make_network(case), *given)
    assert_rounding(x, expected("controllable", name, "x"), ROUNDINGS)

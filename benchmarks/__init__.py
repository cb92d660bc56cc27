"""Benchmarks of scoresde_ext against what people use in its place.

``python -m benchmarks`` compares speed: training and sampling steps, solvers, whole samplers.
``python -m benchmarks.solvers`` compares ODE solvers by the evaluations they need for an error; ``python -m
benchmarks.demo`` times the demo. ``make benchmark`` runs these three, and ``python -m benchmarks.readme``, which writes
what they found into README.md. ``python -m benchmarks.jobs`` measures sampling jobs; ``python -m benchmarks.gpu_check``
tests and measures everything on a GPU. The competitors' own formulas are in ``benchmarks.baselines``; results are in
``benchmarks/results``, those of a ``--quick`` run in ``out/benchmark``.
"""

"""Everything that asks for a GPU, in under ten minutes and without a network: ``make gpu-check``

``driver.py`` runs the parts one after the other and writes what they found; it imports nothing but Python's library, so
that no part can take it along. A part is a process (``part.py``) with a time budget of its own; ``groups.py`` ends it
and all that it started. Parts report through ``reporting.py``, line by line, so that a part that is killed loses only
what it had not measured yet.

| part | file |
|---|---|
| facts | ``facts.py`` |
| build | ``build.py`` |
| smoke | ``smoke.py``, on the calls of ``suite.py`` |
| kernels, solves, steps, compiled steps, network | ``speed.py`` |
| tests, ncu, memcheck, racecheck | ``tools.py`` |
"""

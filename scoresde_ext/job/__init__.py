"""Jobs: a million samples, none lost, none twice. ``docs/jobs.md`` says what is promised and how it is kept.

``settings`` is what a user may ask for, ``networks`` loads the network, ``samplers`` computes shards of samples,
``shards`` writes them as ``files`` that are whole or not there, ``manifest`` knows which exist, ``workers`` shares them
out, ``run`` puts all of it together. ``progress`` and ``report`` show it, ``audit`` looks at what a folder has,
``tasks`` calibrates grids and measures likelihoods, ``commands`` is the command line.
"""

"""Networks as the rest of the package sees them: score functions, exponential moving averages, a registry of
networks."""

"""What happens to output folders when things go wrong, in figures. `python -m benchmarks.reliability --help` lists the trials."""

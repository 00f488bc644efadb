"""Set-up, checks, benchmarks and job submission."""

"""bench_scheduling: the V1-style scheduler beside a V0-style loop, and what the engine costs beside its device."""

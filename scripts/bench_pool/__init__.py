"""bench_pool: what the service around the engines costs, by engines, requests and memory, and what overlap gains."""

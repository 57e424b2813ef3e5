"""Measures what saving and loading cost, beside Orbax and other libraries; `python -m benchmarks`.

    python -m benchmarks list                                 # workloads, peers, what is installed
    python -m benchmarks run --workload gpt2 --rounds 10      # one table for each workload
    python -m benchmarks tune --state mymodel:make_state      # the Context for your own state

docs/benchmarks.md says how each figure is taken.
"""

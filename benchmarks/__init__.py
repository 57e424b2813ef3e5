"""Measures what saving and loading cost, beside Orbax and other libraries; `python -m benchmarks`.

    python -m benchmarks list                                 # workloads, peers, what is installed
    python -m benchmarks run --workload gpt2 --rounds 10      # the tables of a workload
    python -m benchmarks tune --state mymodel:make_state      # the Context for your own state
    python -m benchmarks against ../other-checkout            # new and old, in pairs
    python -m benchmarks calls                                # what a small save and load run

docs/benchmarks.md says how each figure is taken.
"""

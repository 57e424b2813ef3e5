"""The claims of the project, measured: small in every run, in full under ORBAX_ASYNC_SOAK=full.

Each test prints its figures; ``pytest -s`` shows them. Programs that are to be killed, to end, or
to be measured alone lie in ``programs`` and run in interpreters of their own.
"""

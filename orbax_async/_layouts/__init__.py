"""Layouts: the ways in which a checkpoint can lie in a directory.

What this room does: it tells which layout lies at a path (`table`), what a checkpoint of it holds,
and how a stored tree of it is read (`protocol`, and one module a layout: `orbax`, `safetensors`).
What it does not: read values, choose handlers, or write. Orbax's layout is written by handlers.

A new layout is a module here and a row of `table.TABLE`.
"""

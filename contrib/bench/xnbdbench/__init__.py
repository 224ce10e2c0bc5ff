"""The benchmark behind ``contrib/bench/run.py``.

`flavours` says which servers there are, `measurements` what is measured with
which of them; the rest carries that out. Imports point one way: measurements →
probes (`load`, `caching`, `footprint`, `startup`) → `servers` → `flavours`; `results`,
`report` and `plot` know nothing of how numbers came about.
"""

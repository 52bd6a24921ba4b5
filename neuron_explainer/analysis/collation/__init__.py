"""Collation: one pass over a corpus that finds the examples and figures of every unit.

what is looked at      units.py
where tokens stand     places.py
what a batch shows     seen.py
figures                moments.py
examples               reservoirs.py, examples.py
pairs of units         coactivation.py
one pass               findings.py, passes.py
interrupted runs       partial.py
quantiles              quantiles.py
the public function    collate.py
"""

"""Exact changes of a captured graph before it is planned: pools first, sums regrouped, permutations next to a layer.

In comes a `View`, out come `Edit`s, which `graph_edits` makes, and a new view. It imports neither planning nor
rewriting nor reporting: what becomes one layer is decided after it.
"""

"""View -> Plan: which stretches of the graph become one operator, by patterns and cost, and why the rest stays.

Comes in: what `reading` knows of a graph, the chosen patterns, a cost. Goes out: sites and refusals (`sites.Plan`); no
weight is computed, nothing is edited. Never imports graph_edits, rearranging, rewriting, reporting or compiling.
"""

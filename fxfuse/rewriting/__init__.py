"""A plan carried out: weights computed in float64 and rounded once, layers put into the graph, what is left swept.

In come a `View` and a `Plan`, out come the graph and its layers, which `assemble` makes a GraphModule of, and recipes
for other weights. It imports no reporting and no compiler.
"""

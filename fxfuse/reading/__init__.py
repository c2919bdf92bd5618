"""A captured graph read: each node once, into an affine operator, a constant or something opaque, and who writes what.

In comes a `Captured`, out goes a `View`, which is never changed. It imports no pattern, no cost and no stage after it.
"""

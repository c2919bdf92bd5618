"""What is certain of every value: a graph and its calls come in, and out go bounds on rank, sizes and dtype.

Nothing is assumed: a fact follows from the layers around the value, from the capture, or from example inputs, and it is
kept apart which of these hold for every input. Never imports reading, nor anything built on it.
"""

"""What one torch operation is: a node comes in, and out go its canonical `Call`, what it writes and what it asks.

Also whether calling a module runs its class's forward and nothing else. Here no operation knows its neighbours: nothing
of the graph around it, its capture or its sizes. Never imports capture or facts, nor anything built on them.
"""

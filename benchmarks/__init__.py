"""Programs that measure fxfuse; run them from a checkout: `python -m benchmarks.zoo --help`."""

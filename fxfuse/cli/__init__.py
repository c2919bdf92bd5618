"""The `fxfuse` command: words from the command line go in, text and an exit code come out.

It imports the public functions and what describes them; nothing imports it but `python -m fxfuse`.
"""

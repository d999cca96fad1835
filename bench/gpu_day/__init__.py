"""The GPU suite of ``bench.run``: two calls of at most five minutes, planned and rehearsed without a GPU."""

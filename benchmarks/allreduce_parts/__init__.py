"""Parts of the benchmark of collectives ``allreduce.py``: peers, measuring, stress, reporting, projection."""

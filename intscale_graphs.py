"""A name for torch's logging: ``TORCH_LOGS=intscale_graphs`` needs an importable module of this name.

torch only looks whether the file exists; see ``intscale_compile.debug.logs``.
"""

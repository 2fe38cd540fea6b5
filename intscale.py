"""A name for torch's logging: ``TORCH_LOGS=intscale`` needs an importable module of this name.

torch only looks whether the file exists; see ``intscale_compile.debug.logs``.
Importing it gives the package under its short name.
"""

from intscale_compile import *  # noqa: F403

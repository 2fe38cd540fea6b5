"""``python -m intscale_compile.tuning``; a file of its own, since the package has imported its ``__init__`` by then."""

from . import main

if __name__ == "__main__":
    main()

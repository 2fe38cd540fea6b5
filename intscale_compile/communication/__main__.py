"""``torchrun -m intscale_compile.communication``: measures the link between the ranks that torchrun started."""

from .link_tuning import main

if __name__ == "__main__":
    main()

"""``python -m manifold_cl.cli``."""

from manifold_cl.cli import main

main()

"""``python -m manifold_cl``, the same as ``manifold-cl``."""

from manifold_cl.cli import main

main()

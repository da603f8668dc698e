"""Import every public name of both packages, and none of the modules given as arguments."""

import importlib
import importlib.util
import sys

import analysis
import manifold_cl

if "site-packages" not in str(manifold_cl.__file__):
    sys.exit(f"manifold_cl is imported from {manifold_cl.__file__}, and not from the wheel")
for package in (manifold_cl, analysis):
    for name in package.__all__:
        getattr(package, name)
if present := [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]:
    sys.exit(f"installed although nothing asks for it: {', '.join(present)}")

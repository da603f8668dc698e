"""A name on the hub: without a network, one line that says so."""

import subprocess
import sys

command = [sys.executable, "-m", "manifold_cl.cli", "analyze", "hf://nobody/nothing-of-this-name"]
ended = subprocess.run(command, capture_output=True, text=True, check=False)
assert ended.returncode == 2, ended.stderr
assert "nobody/nothing-of-this-name" in ended.stderr.replace("\n", ""), ended.stderr
assert "Traceback" not in ended.stderr, ended.stderr

"""EBLoRA on the toy stream of the tests, with the packages that everybody has; the folder is ``run``."""

from toy import toy_stream

from manifold_cl import ContinualRunner
from manifold_cl.continual import Training, make_method

method = make_method("eblora", rank=4, lr=0.02)
record = ContinualRunner(toy_stream(), method, "run", training=Training(epochs=1)).run()
assert record.status == "complete", record.status

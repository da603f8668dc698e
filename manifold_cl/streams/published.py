"""Names of the published benchmarks of visual instructions, their layout files, and the model that they use."""

PUBLISHED = {"ucit": "ucit.toml", "mllm-dcl": "mllm_dcl.toml"}
"""Stream name → its file in ``presets/``."""
DEFAULT_MODEL = "llava-hf/llava-1.5-7b-hf"
"""The model of the published runs, in transformers' format."""

"""Text that model cards get: how an adapter folder is loaded."""

EBLORA_CARD = """
## How to load this adapter

This is an EBLoRA adapter: orthonormal frames and one magnitude a layer. PEFT learns the method from
the package manifold_cl when that is imported; without the import it stops with `KeyError: 'EBLORA'`.

```python
# pip install "manifold-cl[peft]"
import manifold_cl.adapters.peft  # registers EBLORA
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

To use it where only plain LoRA is understood, convert it exactly: `manifold-cl export path/to/this/folder --out lora`.
"""

"""Sets of adapters, their layers in batches of equal shape, and changed sets for causal tests."""

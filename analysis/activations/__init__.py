"""What a model computes on data: calls of the model, and its layers' inputs in the coordinates of updates."""

from analysis.activations.calls import Forward, call_model, evaluating, named_modules
from analysis.activations.moments import InputMoments, input_moments

__all__ = ["Forward", "InputMoments", "call_model", "evaluating", "input_moments", "named_modules"]

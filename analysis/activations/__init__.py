"""What a model computes on data: calls of the model, and its layers' inputs in the coordinates of updates."""

from analysis.activations.calls import Forward, call_model, evaluating, named_modules
from analysis.activations.moments import InputMoments, input_moments
from analysis.activations.sensitivity import component_effects, example_losses, label_losses

__all__ = [
    "Forward",
    "InputMoments",
    "call_model",
    "component_effects",
    "evaluating",
    "example_losses",
    "input_moments",
    "label_losses",
    "named_modules",
]

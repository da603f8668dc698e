"""Calls of a model on data: changed answers, effects of components on a loss, and moments of its layers' inputs."""

from analysis.activations.added_updates import AddedUpdates
from analysis.activations.answers import answer_changes, answer_intervals, merged_answers
from analysis.activations.calls import Forward, call_model, evaluating, named_modules
from analysis.activations.drift import input_drift
from analysis.activations.moments import InputMoments, input_moments
from analysis.activations.sensitivity import component_effects, example_losses, label_losses

__all__ = [
    "AddedUpdates",
    "Forward",
    "InputMoments",
    "answer_changes",
    "answer_intervals",
    "call_model",
    "component_effects",
    "evaluating",
    "example_losses",
    "input_drift",
    "input_moments",
    "label_losses",
    "merged_answers",
    "named_modules",
]

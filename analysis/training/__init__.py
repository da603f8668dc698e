"""Measurements while a model trains: factors of live adapters, logs per step, and their page."""

from analysis.tables.training_log import read_training_log
from analysis.training.live_factors import model_factors
from analysis.training.training_watch import TrainingWatch

__all__ = ["TrainingWatch", "model_factors", "read_training_log"]

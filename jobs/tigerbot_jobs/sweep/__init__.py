"""Sweeps: many trials of one target over a space, each an MLflow run, through Ray Tune and Optuna."""

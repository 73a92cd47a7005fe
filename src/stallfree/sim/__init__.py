"""Simulation: the engine's own loop and scheduler, with step times instead of a model."""

"""Metrics, the simulator's verdict, speed, plots and the report."""

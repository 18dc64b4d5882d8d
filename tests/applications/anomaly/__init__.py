"""Anomaly detection: formulas against hand-worked cases, then the three tools end to end."""

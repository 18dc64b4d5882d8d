"""Measuring what was trained: reconstruction metrics, the linear baseline, plots and the report."""

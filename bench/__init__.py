"""Measurements: each script prints figures and ratios taken in one run."""

"""What the runs say: one summary, one table with error bars, two figures."""

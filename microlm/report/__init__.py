"""What the runs say to people: the summary, tables, figures, the offline page. It computes nothing new."""

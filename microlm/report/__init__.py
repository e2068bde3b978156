"""What the runs say to people: the summary, tables, figures, the report's page. It computes nothing new."""

"""The report as one file, plots/report.html: what it says, its charts, and how they become a page."""

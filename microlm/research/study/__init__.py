"""The study: many small runs through the DVC queue, and the report of what they show."""

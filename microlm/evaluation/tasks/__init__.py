"""What is asked: tasks, their data, the strings of every protocol, exemplars, figures of others. No model."""

"""How a stage runs on a machine: device, precision, processes, terminal, interrupted state. No model."""

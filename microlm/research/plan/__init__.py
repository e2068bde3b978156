"""What a scale takes, by arithmetic from params.yaml alone: work, bytes, memory, hours. Nothing is run or fetched."""

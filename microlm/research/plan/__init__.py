"""What a scale takes, by arithmetic from params.yaml alone: work, bytes, memory, hours. Nothing is run or downloaded.

Parameters -> sizes (vocabulary, tokens, teacher) -> work, memory, storage -> one page.
"""

"""MicroLM: does distillation pay for a language model under 200M parameters?"""

"""Proves that an exported model computes what its source does: generated cases, their comparison,
the smallest case that fails, and the layer where it goes wrong.

The room's name for it is `deepseek.export.verify`.
"""

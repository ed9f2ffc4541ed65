"""Semirings, and the products of tensors in log space that they are made of."""

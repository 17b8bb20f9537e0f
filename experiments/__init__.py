"""The compared models and the ablations: for readers who check the paper's claims.

Imports every other room; no other room imports it.
"""

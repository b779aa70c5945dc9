"""Conversion of models that are larger than memory: one decoder block at a time, resumable after each.

conversion tells the story; model runs one block in the place of all, source reads the dense weights and notices
changes, carried keeps the activations between blocks, partial is the unfinished folder with its lock and journal.
"""

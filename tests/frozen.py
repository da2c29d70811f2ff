"""Loaded last by the process that others are forked from: what it loaded is in no collection of theirs."""

import gc

gc.collect()
gc.freeze()

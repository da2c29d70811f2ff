"""Files of other projects, read and written: one module a format.

`tables` reads the rows of JSON lines, JSON arrays, parquet, CSV and TSV; `rows` brings their ids, texts,
lists, gold answers and numbers into one form; `training` has what the formats of training data share.
"""

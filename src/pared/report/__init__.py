"""What a run measured, for people: `render` is the table for terminals, `html` the offline page and the notebook's.

`data` is the schema, `words` says figures the same way everywhere, `plots` computes the geometry of the page's plots.
"""

"""What a run measured: `data` is the schema, `render` the table for terminals, `html` the offline page and the notebook's
table. `words` says figures the same way in both, `plots` computes the geometry of the page's plots.
"""

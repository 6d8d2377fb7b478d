"""Data: what turns common sources into batches that can be read again and again, and the embedded data set.

`adapters` is what `Task` calls; `batches` orders and cuts; `images` decodes; `fashion_mnist` and `tasks` are the
embedded data and what to do with it. Nothing here downloads anything.
"""

"""Reading a model: capture by `torch.export`, operator counts. Nothing here changes a module."""

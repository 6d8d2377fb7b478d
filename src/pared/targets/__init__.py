"""Runtimes that ship models. Light on import: a worker process opens files without loading torch."""

"""pared: make a trained PyTorch network smaller and faster, with the proof measured on the file that ships."""

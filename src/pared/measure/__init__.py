"""Taking figures: how close outputs are, how long a file takes, how much memory, on what machine. No torch here."""

"""The head, its loss and the embedding, a tile of the vocabulary at a time."""

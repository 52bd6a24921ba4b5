"""The three formats of a model's folder: this library's, the original's pieces, Hugging Face's."""

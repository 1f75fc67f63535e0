"""The corpus: files that people bring, and the stores that are made from them."""

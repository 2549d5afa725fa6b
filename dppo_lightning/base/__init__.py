"""Records, errors and helpers that every part of the package may import; nothing here imports another part."""

"""The checks, by subject. All modules of this folder are imported; a new subject is a new file."""

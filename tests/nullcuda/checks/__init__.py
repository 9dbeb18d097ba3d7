"""The checks of the kit, by subject. Each module of this folder is imported; a new subject is a new file."""

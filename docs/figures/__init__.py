"""The drawings of the pages: one module a figure, each with `draw(path)`."""

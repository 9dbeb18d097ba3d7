"""The forms in which data sets lie on disk: each module finds the images of one of them, and opens none."""

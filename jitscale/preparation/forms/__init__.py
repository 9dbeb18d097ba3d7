"""The forms of data sets on disk. Each module finds the images of one form, and opens none of them."""

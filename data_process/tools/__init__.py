"""What looks at sets of rows and makes none: a list, a viewer, statistics."""

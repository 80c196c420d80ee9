"""Tools that look at sets of rows and make none: a list, a viewer, statistics."""

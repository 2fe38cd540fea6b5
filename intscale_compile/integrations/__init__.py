"""All that is used of the private parts of other packages."""

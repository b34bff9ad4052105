"""A capture in other forms: a tar, an image layout, an image in a registry. One digest, the same content in each."""

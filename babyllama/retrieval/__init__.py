"""Texts to answer from: a full-text index, Wikipedia, and who looks them up."""

"""Other ways to a better model: preferences, regularisation, mean weights."""

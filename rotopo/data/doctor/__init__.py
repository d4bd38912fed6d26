"""The data doctor: checks of tokenised data, before a model is loaded."""

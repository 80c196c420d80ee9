"""What a model has learnt, forgot and costs."""

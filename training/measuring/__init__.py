"""Evaluation of answers, rankings, preferences and costs."""

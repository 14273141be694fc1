"""Analyse programs without changing them: adapter sites, attention, token inputs, facts about the model."""

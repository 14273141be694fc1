"""First values of LoRA that are made of data: the options of each scheme, its statistics, and its formulas.

``adaptc.training.from_data`` runs the program on batches and hands the statistics over.
"""

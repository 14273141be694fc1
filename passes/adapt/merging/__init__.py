"""The merge of adapters into weights, and what it keeps beside them."""

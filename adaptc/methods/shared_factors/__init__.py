"""Methods of the family of LoRA whose layers share factors, random or trained."""

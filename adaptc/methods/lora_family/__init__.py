"""LoRA and the methods that PEFT derives from it: low-rank changes of a weight."""

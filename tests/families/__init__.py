"""Real architectures at tiny sizes, against PEFT."""

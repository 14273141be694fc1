"""The changes that adapters make to weights: computed site by site, and turned into LoRA."""
